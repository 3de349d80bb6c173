"""An ONNX file, and which files beside it hold its tensors.  Imports neither TVM nor torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vllm_compile.errors import ModelError


@dataclass(frozen=True)
class Place:
    """Bytes of a file beside the graph's; `length` is None where only the tensor's shape says how many."""

    file: str
    offset: int
    length: int | None


def parse(file: Path) -> Any:
    """The file's ModelProto, without the tensors that are kept beside it.

    Raises:
        ModelError: the package `onnx` is missing, the file is none of ONNX, or is damaged.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError as error:
        raise ModelError(f"{file}: ONNX needs the package {error.name}; pip install 'vllm-compile[onnx]'") from error
    try:
        model = onnx.load(file, load_external_data=False)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read ({error.strerror})") from error
    except DecodeError as error:
        raise ModelError(f"{file}: not an ONNX file, or not whole ({error})") from error
    if not model.graph.node:
        raise ModelError(f"{file}: not an ONNX file: it has no graph")
    return model


def places(file: Path, model: Any) -> dict[str, Place]:
    """Where those tensors of a ModelProto are that are kept beside it, by their names.

    Raises:
        ModelError: one is said to be outside the model's directory, or its place is no place.
    """
    stored = model.graph.initializer
    return {proto.name: _place(file, proto) for proto in stored if proto.data_location == proto.EXTERNAL}


def tensor_files(file: Path) -> list[str]:
    """Names of the files beside an ONNX file that hold its tensors; raises what `parse` and `places` do."""
    return sorted({place.file for place in places(file, parse(file)).values()})


def _place(file: Path, proto: Any) -> Place:
    given = {entry.key: entry.value for entry in proto.external_data}
    location = PurePosixPath(given.get("location", ""))
    if not location.parts:
        raise ModelError(f"{file}: {proto.name} is said to be kept beside the graph, but not in which file")
    if location.is_absolute() or ".." in location.parts:
        raise ModelError(f"{file}: {proto.name} is said to be in {str(location)!r}, outside the model's directory")
    try:
        length = int(given["length"]) if "length" in given else None
        place = Place(str(location), int(given.get("offset", 0)), length)
    except ValueError as error:
        raise ModelError(f"{file}: the place of {proto.name} cannot be read ({error})") from error
    if place.offset < 0 or (length or 0) < 0:
        bytes_of = "what" if length is None else f"{length} bytes"
        raise ModelError(f"{file}: {proto.name} is said to be {bytes_of} from {place.offset} on in {place.file}")
    return place
