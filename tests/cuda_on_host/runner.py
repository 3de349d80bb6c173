"""Runs a device function on the CPU, every thread of every block: `run`, and `run_kernel` for TVM's PrimFunc.

    y = torch.full((3, 320), float("nan"), dtype=torch.bfloat16)
    run(
        "stream_linear.cuh",
        "vllm_compile::stream_linear<1, 1, 16, 2, 0, true, false, false>(x, w, bias, nullptr, y, tokens, N, K, shared)",
        grid=(20, 1), block=512, shared_bytes=65536,
        arguments={"x": x, "w": w, "bias": None, "y": y, "tokens": 3, "N": 320, "K": 576},
        early={"w"},  # what may be read before wait_for_kernels_before()
    )

An `EmulationError` (an AssertionError) says what is wrong, and where: a race in shared memory, lanes that do not meet,
a deadlock, an access outside of a tensor or misaligned, an access before the kernels before are waited for.  What is
only computed wrongly is for the caller to see in the results.  Threads run in an order that `seed` decides.

`run_kernel(family.build(spec, config, target), x, w, y)` takes the grid, the shared memory and the arguments of the
call from the PrimFunc, as TVM launches it.

Needs g++ on x86-64 Linux (`AVAILABLE`), and neither CUDA nor a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import re
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from vllm_compile.schedules import cuda

HERE = Path(__file__).parent
KERNELS = Path(cuda.__file__).parent
AVAILABLE = platform.machine() == "x86_64" and platform.system() == "Linux" and shutil.which("g++") is not None

ENGINE = ("emulator.cpp", "memory.cpp", "ptx_on_host.cpp")
COMMON = ["-std=c++20", "-g1", "-w", "-fPIC", "-fno-gnu-unique", "-fvisibility=hidden", f"-I{HERE}", f"-I{KERNELS}"]
KERNEL_FLAGS = [
    *COMMON,
    "-O1",
    "-DVLLM_COMPILE_ON_HOST",
    "-ffp-contract=off",
    "-fsanitize=thread",  # calls before each load and store, see memory.cpp
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds",
    "-fsanitize-undefined-trap-on-error",
    "-ftrivial-auto-var-init=pattern",  # what is not initialised is no zero
]
TYPES = {
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "int64": "int64_t",
    "int32": "int32_t",
    "uint8": "uint8_t",
    "uint32": "uint32_t",
}

NOTHING, READS, ANYTHING = range(3)  # that a kernel may do with a tensor before it waits for the kernels before

Value = torch.Tensor | int | float | None


class EmulationError(AssertionError):
    """What the emulator found."""


@dataclass(frozen=True)
class Report:
    """What a launch did.

    Attributes:
        launched: least and most calls of launch_dependents() by one thread.
        waited: the same of wait_for_kernels_before().
    """

    seed: int
    launched: tuple[int, int]
    waited: tuple[int, int]


class _Argument(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("value", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
        ("is_tensor", ctypes.c_uint32),
        ("early", ctypes.c_uint32),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32),
        ("together", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(_Argument)),
        ("launched", ctypes.c_uint32 * 2),
        ("waited", ctypes.c_uint32 * 2),
        ("code", ctypes.c_uint64),
        ("message", ctypes.c_char * 4096),
    )


def run(
    include: str,
    call: str,
    *,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    arguments: Mapping[str, Value],
    shared_bytes: int = 0,
    cluster: int = 1,
    together: int | None = None,
    early: Collection[str] | None = None,
    source: str = "",
    seed: int | None = None,
) -> Report:
    """Run `call` in every thread of a grid.

    Args:
        include: the header that it needs, of schedules/cuda.
        call: a C++ expression in terms of the names of `arguments`, and of `shared`.
        grid: blocks, and `block` threads, along x, y and z.
        arguments: tensors on the CPU, which the call changes in place, numbers, or None for a null pointer.
        shared_bytes: of the dynamic shared memory of a block.
        cluster: blocks of a cluster, along x.
        together: blocks that are resident at the same time (default: one cluster).
        early: tensors that may be read before wait_for_kernels_before(), and no other; None: all, and written, too.
        source: C++ between the header and the call.
        seed: of the order in which threads and blocks run (default: random).

    Raises:
        EmulationError: see above; the tensors are unchanged.
    """
    text = f'#include "{include}"\n{source}' if include else source
    library = _load(compile_unit(unit(text, call, {name: _type_of(value) for name, value in arguments.items()})))
    given = [_argument(name, value, early) for name, value in arguments.items()]
    launch = _Launch(
        grid=_triple(grid),
        threads=_triple(block),
        cluster=cluster,
        together=together or cluster,
        shared_bytes=shared_bytes,
        count=len(given),
        seed=secrets.randbits(48) if seed is None else seed,
        arguments=(_Argument * max(len(given), 1))(*given),
    )
    print(f"order of threads: seed={launch.seed}")
    if library.run(ctypes.byref(launch)):
        where = _line_of(library._name, launch.code) if launch.code else ""
        raise EmulationError(f"{launch.message.decode()}{where}\n  in {call}, seed={launch.seed}")
    return Report(launch.seed, tuple(launch.launched), tuple(launch.waited))


def prepare(units: Collection[str]) -> None:
    """Compile several translation units at once."""
    _engine()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_unit, units))


def unit(source: str, call: str, types: Mapping[str, str]) -> str:
    """The translation unit of a call; the arguments' values are no part of it.

    Args:
        types: C++ types of the arguments; "" is a null pointer.
    """
    lines = [
        "#include <cuda_bf16.h>",
        '#line 1 "source"',
        source,
        '#line 1 "call"',
        "static void body(const uint64_t* values, void* shared) {",
    ]
    for i, (name, kind) in enumerate(types.items()):
        if kind.endswith("*"):
            lines.append(f"  const auto {name} = reinterpret_cast<{kind}>(values[{i}]);")
        elif kind == "float":
            lines.append(f"  const float {name} = __builtin_bit_cast(double, values[{i}]);")
        else:
            lines.append(f"  const {kind} {name} = values[{i}];" if kind else f"  const auto {name} = nullptr;")
    lines += [
        f"  {call};",
        "}",
        'extern "C" __attribute__((visibility("default"))) int run(cuda_on_host::Launch* launch) {',
        "  return cuda_on_host::launch(*launch, body);",
        "}",
    ]
    return "\n".join(lines) + "\n"


@cache
def compile_unit(text: str) -> Path:
    """The shared library of a translation unit."""
    name = hashlib.sha256(text.encode()).hexdigest()[:24]
    source, object_file, library = (Path(_folder().name, f"{name}{suffix}") for suffix in (".cpp", ".o", ".so"))
    source.write_text(text)
    _gxx(*KERNEL_FLAGS, "-c", str(source), "-o", str(object_file))
    # Without -fsanitize=thread, which would add its library.
    _gxx("-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic", str(object_file), *_engine(), "-o", str(library))
    return library


def _type_of(value: Value) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[str(value.dtype).removeprefix("torch.")] + "*"
    return "" if value is None else "float" if isinstance(value, float) else "int64_t"


def _argument(name: str, value: Value, early: Collection[str] | None) -> _Argument:
    if isinstance(value, torch.Tensor):
        # All bytes from its first element to its last, whatever its strides.
        elements = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
        size = elements * value.element_size() if value.numel() else 0
        allowed = ANYTHING if early is None else READS if name in early else NOTHING
        return _Argument(name.encode(), value.data_ptr(), size, 1, allowed)
    if isinstance(value, float):
        value = int.from_bytes(bytes(ctypes.c_double(value)), "little")
    return _Argument(name.encode(), (value or 0) & (2**64 - 1), 0, 0, 0)


def _triple(sizes: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return (*sizes, 1, 1)[:3]


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="cuda_on_host_")


@cache
def _engine() -> list[str]:
    """The emulator's own object files."""
    objects = [str(Path(_folder().name, name).with_suffix(".o")) for name in ENGINE]
    with ThreadPoolExecutor(2) as pool:
        commands = ([*COMMON, "-O1", "-c", str(HERE / name), "-o", o] for name, o in zip(ENGINE, objects, strict=True))
        list(pool.map(lambda command: _gxx(*command), commands))
    return objects


def _gxx(*arguments: str) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ failed:\n{done.stderr[:4000]}")


@cache
def _load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def _line_of(library: str, code: int) -> str:
    """The line of the kernel that an address of code belongs to."""
    if shutil.which("addr2line") is None:
        return ""
    # A return address belongs to the next instruction.
    command = ["addr2line", "-i", "-e", library, hex(code - 1)]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
    found = [re.sub(r".*/| \(.*", "", line) for line in lines if line and "?" not in line]
    return f" ({', from '.join(found)})" if found else ""
