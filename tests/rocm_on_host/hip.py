"""The fake HIP of this process: compiled from C, loaded as libamdhip64.so, found by kernels.so like the real one."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from . import code_object

SOURCE = Path(__file__).with_name("fake_hip.c")
SUCCESS, INVALID_VALUE, NOT_FOUND, UNKNOWN = 0, 1, 500, 999


class _Launch(ctypes.Structure):
    _fields_ = [
        ("image", ctypes.c_void_p),
        ("kernel", ctypes.c_char_p),
        ("device", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
    ]


ON_LOAD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
ON_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
ON_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))


@dataclass(frozen=True)
class Launch:
    """One call of hipModuleLaunchKernel.

    Attributes:
        arguments: by name, as the code object's metadata lays them out.
        pointers: names of those that are addresses.
    """

    kernel: str
    device: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    stream: int | None
    arguments: dict[str, int]
    pointers: frozenset[str]


@dataclass
class Recorded:
    """What has been called since recording began; `execute`, if there is one, runs each launch."""

    execute: Callable[[Launch], None] | None = None
    loads: list[tuple[str, int]] = field(default_factory=list)  # (processor, device)
    launches: list[Launch] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    refuse_loads: bool = False


_now: list[Recorded] = []


@contextmanager
def recording(execute: Callable[[Launch], None] | None = None) -> Iterator[Recorded]:
    """Have HIP calls recorded; what goes wrong in them is raised at the end."""
    load()
    _now.append(Recorded(execute))
    try:
        yield _now[-1]
    finally:
        recorded = _now.pop()
        if recorded.errors:
            raise recorded.errors[0]


@cache
def load() -> tuple[Any, ...]:
    """The library, and what it calls: loaded once, for the life of the process."""
    path = Path(tempfile.mkdtemp(prefix="fake_hip")) / "libamdhip64.so"
    command = ["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", str(SOURCE)]
    subprocess.run([*command, "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    path.unlink()
    path.parent.rmdir()
    callbacks = (ON_LOAD(_guarded(_on_load)), ON_FUNCTION(_guarded(_on_function)), ON_LAUNCH(_guarded(_on_launch)))
    for name, callback in zip(("load", "function", "launch"), callbacks, strict=True):
        ctypes.c_void_p.in_dll(library, f"fake_hip_on_{name}").value = ctypes.cast(callback, ctypes.c_void_p).value
    return library, callbacks


def _guarded(function: Callable[..., int]) -> Callable[..., int]:
    """What is raised cannot cross C: it is kept, and HIP fails."""

    def call(*arguments: Any) -> int:
        try:
            return function(_now[-1], *arguments)
        except BaseException as error:
            _now[-1].errors.append(error)
            return UNKNOWN

    return call


def _on_load(recorded: Recorded, image: int, device: int) -> int:
    if recorded.refuse_loads:
        return INVALID_VALUE
    recorded.loads.append((code_object.machine(code_object.image_at(image)), device))
    return SUCCESS


def _on_function(recorded: Recorded, image: int, name: bytes) -> int:
    return SUCCESS if name.decode() in code_object.kernels(code_object.image_at(image)) else NOT_FOUND


def _on_launch(recorded: Recorded, pointer: Any) -> int:
    call = pointer.contents
    name = call.kernel.decode()
    kernel = code_object.kernels(code_object.image_at(call.image))[name]
    if call.size != kernel[".kernarg_segment_size"] or call.shared:
        return INVALID_VALUE
    if not 0 < call.block[0] * call.block[1] * call.block[2] <= kernel[".max_flat_workgroup_size"]:
        return INVALID_VALUE
    memory = ctypes.string_at(call.arguments, call.size)
    values = {}
    for argument in kernel[".args"]:
        start = argument[".offset"]
        values[argument[".name"]] = int.from_bytes(memory[start : start + argument[".size"]], "little", signed=True)
    pointers = frozenset(a[".name"] for a in kernel[".args"] if a[".value_kind"] == "global_buffer")
    launch = Launch(name, call.device, tuple(call.grid), tuple(call.block), call.stream, values, pointers)
    recorded.launches.append(launch)
    if recorded.execute is not None:
        recorded.execute(launch)
    return SUCCESS
