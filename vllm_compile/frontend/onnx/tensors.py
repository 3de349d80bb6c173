"""The initializers of an ONNX graph, read one at a time: most lie in a file beside it, maybe larger than memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_compile.errors import ModelError, UnsupportedError

from .file import places

# ONNX's numbers for element types (onnx.proto, TensorProto.DataType) and torch's types for those that weights have.
FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
FLOATS = {FLOAT: "float32", FLOAT16: "float16", BFLOAT16: "bfloat16"}
TORCH = {FLOAT: torch.float32, FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}
WHOLE_NUMBERS: dict[int, np.dtype[Any]] = {6: np.dtype("<i4"), 7: np.dtype("<i8")}
ITEM_BYTES = {**{e: t.itemsize for e, t in TORCH.items()}, **{e: n.itemsize for e, n in WHOLE_NUMBERS.items()}}


class Initializers:
    """The tensors of a graph, by name.

    Args:
        file: the graph's; those of its tensors that it does not hold are in files beside it.
        model: the graph's ModelProto.

    Raises:
        ModelError: see `places`.
    """

    def __init__(self, file: Path, model: Any) -> None:
        self._file = file
        self._protos = {proto.name: proto for proto in model.graph.initializer}
        self._external = places(file, model)

    def __contains__(self, name: str) -> bool:
        return name in self._protos

    def names(self) -> list[str]:
        return list(self._protos)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._protos[name].dims)

    def element_type(self, name: str) -> int:
        """ONNX's number for it."""
        return self._protos[name].data_type

    def check(self) -> None:
        """Find tensors that are missing or cut off, before any is read.

        Raises:
            ModelError: one is; the file is named.
        """
        for name, place in self._external.items():
            path = self._file.parent / place.file
            if not path.is_file():
                raise ModelError(f"{path}: missing; it holds tensors of {self._file.name}, {name} among them")
            if place.offset + self._bytes(name) > path.stat().st_size:
                raise ModelError(f"{path}: too short for {name}; is the file whole?")

    def read(self, name: str) -> torch.Tensor:
        """The tensor called `name`, in the type it was stored in.

        Raises:
            ModelError: its bytes are missing.
            UnsupportedError: it does not hold plain floating-point numbers.
        """
        proto = self._protos[name]
        if proto.data_type not in TORCH:
            raise UnsupportedError(
                f"{self._file}: tensor {name} has elements of type {proto.data_type}: quantised "
                "models are not supported; export it in fp32, fp16 or bf16"
            )
        dtype, shape = TORCH[proto.data_type], self.shape(name)
        content = self._content(name)
        if content is not None:
            return torch.frombuffer(content, dtype=dtype).reshape(shape) if content else torch.empty(shape, dtype=dtype)
        from onnx import numpy_helper

        # Through float64: NumPy has no bfloat16.
        return torch.from_numpy(numpy_helper.to_array(proto).astype("float64")).to(dtype)

    def whole_numbers(self, name: str) -> np.ndarray | None:
        """The values of a tensor of integers, None for any other."""
        proto = self._protos[name]
        if proto.data_type not in WHOLE_NUMBERS:
            return None
        content = self._content(name)
        if content is not None:
            return np.frombuffer(content, WHOLE_NUMBERS[proto.data_type]).reshape(self.shape(name))
        from onnx import numpy_helper

        return numpy_helper.to_array(proto)

    def _bytes(self, name: str) -> int:
        """Of a tensor that is kept beside the graph."""
        place, element = self._external[name], self._protos[name].data_type
        if element not in ITEM_BYTES:
            return place.length or 0
        needed = ITEM_BYTES[element] * math.prod(self.shape(name))
        if place.length not in (None, needed):
            raise ModelError(f"{self._file}: {name} has {needed} bytes by its shape, {place.length} by its entry")
        return needed

    def _content(self, name: str) -> bytearray | None:
        """A tensor's bytes; None where they are kept as numbers in the graph."""
        if name not in self._external:
            proto = self._protos[name]
            return bytearray(proto.raw_data) if proto.HasField("raw_data") else None
        place = self._external[name]
        path = self._file.parent / place.file
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                content = bytearray(self._bytes(name))
                read = file.readinto(content)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror}); it holds {name}") from error
        if read != len(content):
            raise ModelError(f"{path}: too short for {name}; is the file whole?")
        return content
