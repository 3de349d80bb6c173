"""PrimFuncs to one shared library with machine code for a GPU, on a machine with or without one.

TVM's `cuda_host` code generator writes kernels and the host code that launches them as one CUDA C++ source, on
apache-tvm-ffi's ABI: argument checks, device guard, the stream of `TVMFFIEnvGetStream` (PyTorch's current one), launch
attributes.  nvcc makes the library of it.  Loading it needs neither TVM nor a GPU; running needs a driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tvm
import tvm_ffi
import tvm_ffi.libinfo
from tvm import tirx
from tvm.backend.cuda import export_cuda_host

from vllm_compile.errors import TargetError
from vllm_compile.targets.cuda import CudaTarget
from vllm_compile.toolchain import environment, find_nvcc

HEADERS = Path(__file__).parent  # the device functions that kernels call
COMPILE = "tvm_callback_cuda_compile"
RESTRICT = "__restrict__ "


@dataclass(frozen=True)
class Resources:
    """What the assembler says of a kernel.

    Attributes:
        registers: of a thread.
        spilled_bytes: of local memory that they did not suffice for.
        serialized: its wgmma products wait for each other, as the assembler did not understand how they are used.
    """

    registers: int
    spilled_bytes: int
    serialized: bool


def source(kernels: Mapping[str, tirx.PrimFunc], target: CudaTarget) -> str:
    """The CUDA C++ source of `kernels` (symbol -> function) and of their host functions.

    TVM declares what kernels read as written by nobody.  But kernels start while the one before them, which writes it,
    still runs: nvcc would move loads to before they wait for it.  So no pointer is `__restrict__`.
    """
    functions = {symbol: function.with_attr("global_symbol", symbol) for symbol, function in sorted(kernels.items())}
    machine = tvm.target.Target(target.tvm_config(), host=tvm.target.Target({"kind": "cuda_host"}))
    with _uncompiled():
        return export_cuda_host(tvm.compile(tvm.IRModule(functions), target=machine).mod).replace(RESTRICT, "")


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Where there is a CUDA driver, TVM would compile the kernels by themselves, which is not needed here."""
    usual = tvm_ffi.get_global_func(COMPILE)
    tvm_ffi.register_global_func(COMPILE, lambda code: b"not compiled", override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(COMPILE, usual, override=True)


def build_library(kernels: Mapping[str, tirx.PrimFunc], target: CudaTarget, path: Path) -> dict[str, Resources]:
    """Compile `kernels` (symbol -> function) for `target` into the shared library `path`.

    The library depends on apache-tvm-ffi's ABI and the CUDA driver alone.

    Returns:
        The resources of each kernel by its symbol.

    Raises:
        TargetError: nvcc is missing or fails.
    """
    nvcc = find_nvcc()
    with tempfile.TemporaryDirectory() as scratch:
        code = Path(scratch) / "kernels.cu"
        code.write_text(source(kernels, target))
        command = [nvcc, "-shared", "-O3", "-std=c++17", "-cudart=static", "-Xcompiler=-fPIC", "-Xptxas=-v"]
        command += ["-Xlinker=--strip-all"]  # names of nvcc's temporary files, which differ each time
        command += [f"-gencode=arch={target.arch.replace('sm', 'compute')},code={target.arch}"]
        command += [
            f"-I{folder}"
            for folder in (HEADERS, tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path())
        ]
        command += ["-o", str(path), str(code)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise TargetError("nvcc failed: " + "; ".join(errors[:5] or done.stderr.splitlines()[-5:]))
    return _resources(done.stdout + done.stderr)


def _resources(report: str) -> dict[str, Resources]:
    """By symbol, of the assembler's report."""
    serialized = set(re.findall(r"wgmma.mma_async instructions are serialized .*function '(\w+)'", report))
    found = {}
    for part in report.split("Compiling entry function '")[1:]:
        numbers = [re.search(pattern, part) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
        registers, spilled = (int(match[1]) if match else 0 for match in numbers)
        name = part.split("'")[0]
        found[name.removesuffix("_kernel")] = Resources(registers, spilled, name in serialized)
    return found
