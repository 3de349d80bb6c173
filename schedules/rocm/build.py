"""PrimFuncs to one shared library with code objects for an AMD GPU, on a machine with or without one.

TVM's LLVM makes an AMDGPU object of the kernels and ld.lld a code object (hsaco) of that; it travels as data in the
library.  Host functions, by TVM's LLVM too, check arguments and compute the grid; they call `runtime/hip.c`, which
loads the code object and launches, on apache-tvm-ffi's current stream.  Loading the library needs neither TVM nor
ROCm; running needs HIP.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
import yaml
from tvm import tirx
from tvm.ir import Call, Op
from tvm.script import tirx as T
from tvm.tirx.build import codegen_build, split_host_device_mods

from vllm_compile import runtime
from vllm_compile.errors import TargetError
from vllm_compile.targets.rocm import RocmTarget
from vllm_compile.toolchain import find_lld

from ..gcc import gcc

LAUNCHER = Path(runtime.__file__ or "").parent / "hip.c"
HOST = {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": "x86-64"}
LINK, DEVICE_LIBRARIES = "tvm_callback_rocm_link", "tvm_callback_rocm_bitcode_path"
ARGUMENT_BYTES = 8  # of every argument of a kernel: runtime/hip.c lays them out as an array
GRID = ("blockIdx.x", "blockIdx.y", "blockIdx.z", "threadIdx.x")
WORKSPACE = "vllm_compile_workspace"  # of runtime/hip.c: memory of the device that kernels leave each other
WORKSPACE_BYTES = "workspace_bytes"  # an attribute of a PrimFunc: how much of it
# S_WAITCNT's counters on gfx9 (CDNA3 ISA, SOPP instructions): lgkmcnt 0 (bits 8 to 11); vmcnt 63 (0 to 3, 14, 15) and
# expcnt 7 (4 to 6), their largest, wait for nothing.
LDS_DONE = 0xC07F
LDS_AS_GLOBAL = "addrspacecast (ptr addrspace(3)"
METADATA = re.compile(r"\.amdgpu_metadata\n(.*?)\s*\.end_amdgpu_metadata", re.DOTALL)


@dataclass(frozen=True)
class Resources:
    """What the code object's metadata says of a kernel.

    Attributes:
        arguments: their names, in the order in which they lie in memory, 8 bytes each.
        registers: vector registers of a lane, accumulation registers included.
        spilled: registers that went to memory; `scratch_bytes` is a lane's memory for that, or for arrays.
        lds_bytes: local data share of a thread block.
        threads: a thread block has no more.
    """

    arguments: tuple[str, ...]
    registers: int
    spilled: int
    scratch_bytes: int
    lds_bytes: int
    threads: int


@dataclass(frozen=True)
class CodeObject:
    """Kernels in machine code.

    Attributes:
        elf: the file that HIP loads.
        resources: of each kernel by its name in it, which is the symbol with `_kernel` after it; `_kernel_1` of a
            function's second launch.
        assembly: as LLVM prints it.
    """

    elf: bytes
    resources: Mapping[str, Resources]
    assembly: str


def compile_kernels(kernels: Mapping[str, tirx.PrimFunc], target: RocmTarget) -> tuple[CodeObject, tvm.IRModule]:
    """The code object of `kernels` (symbol -> function), and their host functions, before the last lowering.

    Raises:
        TargetError: no linker, or it fails.
    """
    linker = find_lld()
    functions = {
        symbol: function.with_attr("global_symbol", symbol).with_attr("tirx.noalias", True)
        for symbol, function in sorted(kernels.items())
    }
    machine = tvm.target.Target(target.tvm_config(), host=tvm.target.Target(HOST))
    lower, _, finish_device = tirx.get_default_tir_pipeline(machine)
    lowered = lower(tirx.transform.BindTarget(machine)(tvm.IRModule(functions)))
    host, devices = split_host_device_mods(lowered)
    ((device_target, device),) = devices.items()
    with _unlinked() as objects:
        device = tvm_ffi.structural_map(device, (tirx.Evaluate, _waiting))
        module = codegen_build(finish_device()(device), device_target)
    # TVM lets buffers whose uses are apart share memory, and takes a second one of LDS for memory of the device.
    assert LDS_AS_GLOBAL not in module.inspect_source("llvm"), "a kernel has one buffer of LDS"
    assembly = module.inspect_source("asm")
    return CodeObject(_link(objects[-1], linker), _resources(assembly), assembly), host


def build_library(kernels: Mapping[str, tirx.PrimFunc], target: RocmTarget, path: Path) -> Mapping[str, Resources]:
    """Compile `kernels` (symbol -> function) for `target` into the shared library `path`.

    The library depends on apache-tvm-ffi's ABI, and HIP once a kernel is run.

    Returns:
        The resources of each kernel by its symbol, those of a function's second launch by `<symbol>_kernel_1`.

    Raises:
        TargetError: the linker or gcc is missing or fails.
    """
    code, host = compile_kernels(kernels, target)
    host = tvm_ffi.structural_map(host, (tirx.PrimFunc, _launching))
    _, finish_host, _ = tirx.get_default_tir_pipeline(tvm.target.Target(HOST))
    module = codegen_build(finish_host()(host), tvm.target.Target(HOST))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "kernels.hsaco").write_bytes(code.elf)
        (folder / "kernels.inc").write_text("".join(f"KERNEL({name})\n" for name in code.resources))
        module.write_to_file(str(folder / "host.o"), "o")
        workspace = max((int(f.attrs.get(WORKSPACE_BYTES, 0)) for f in kernels.values()), default=0)
        options = ["-O2", "-fPIC", f"-I{folder}", f"-Wa,-I{folder}", f"-DWORKSPACE_BYTES={workspace}"]
        gcc(*options, "-c", str(LAUNCHER), "-o", str(folder / "hip.o"))
        gcc("-shared", str(folder / "host.o"), str(folder / "hip.o"), "-o", str(path))
    return {name.removesuffix("_kernel"): resources for name, resources in code.resources.items()}


@contextmanager
def _unlinked() -> Iterator[list[bytes]]:
    """Have TVM leave its objects in the list, neither linked by the ld.lld it would find nor with ROCm's libraries."""
    objects: list[bytes] = []

    def keep(code: Any) -> bytes:
        objects.append(bytes(code))
        return b""

    usual = {name: tvm_ffi.get_global_func(name) for name in (LINK, DEVICE_LIBRARIES)}
    tvm_ffi.register_global_func(LINK, keep, override=True)
    tvm_ffi.register_global_func(DEVICE_LIBRARIES, lambda *_: [], override=True)
    try:
        yield objects
    finally:
        for name, function in usual.items():
            tvm_ffi.register_global_func(name, function, override=True)


def _link(code: bytes, linker: Sequence[str]) -> bytes:
    """The code object of an AMDGPU object file."""
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "kernels.o", Path(scratch) / "kernels.hsaco"
        source.write_bytes(code)
        command = [*linker, "--no-undefined", "-shared", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TargetError(f"{linker[-1]} failed: {done.stderr.strip()}")
        return out.read_bytes()


def _waiting(statement: tirx.Evaluate) -> tirx.Stmt:
    """A barrier after a wait for the wave's own accesses to LDS.

    S_BARRIER does not wait for them.  TVM emits it without the fences that would have LLVM wait, and from gfx90a on
    LLVM puts no wait of its own there.  Stores to global memory are not waited for: no kernel exchanges any there.
    """
    call = statement.value
    if not (isinstance(call, Call) and call.op.same_as(Op.get("tirx.tvm_storage_sync"))):
        return statement
    wait = T.call_llvm_intrin("void", "llvm.amdgcn.s.waitcnt", T.int32(LDS_DONE))
    return tirx.SeqStmt([tirx.Evaluate(wait), statement])


def _launching(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The host function, calling `runtime/hip.c` as C: kernel(arguments..., grid x, y, z, threads, device)."""
    set_device, launch = Op.get("tirx.tvm_call_packed"), Op.get("tirx.call_ffi_kernel")
    devices: list[Any] = []

    def direct(call: Call) -> Any:
        if call.op.same_as(set_device):
            devices.append(call.args[2])
            return T.int32(0)
        if call.op.same_as(launch):
            name, *values = call.args
            tags = list(map(str, call.attrs["launch_params"]))
            extents = dict(zip(tags, values[len(values) - len(tags) :], strict=True))
            grid = [T.Cast("int64", extents.get(tag, 1)) for tag in GRID]
            return T.call_cpacked(name, *values[: len(values) - len(tags)], *grid, devices[-1])
        return call

    return function.with_body(tvm_ffi.structural_map(function.body, (Call, direct)))


def _resources(assembly: str) -> dict[str, Resources]:
    """By kernel, of the metadata that LLVM prints with the assembly.

    Raises:
        TargetError: a kernel has arguments that `runtime/hip.c` does not lay out.
    """
    match = METADATA.search(assembly)
    assert match, "LLVM prints the metadata of an HSA code object"
    return {kernel[".name"]: _kernel_resources(kernel) for kernel in yaml.safe_load(match[1])["amdhsa.kernels"]}


def _kernel_resources(kernel: Mapping[str, Any]) -> Resources:
    arguments: Sequence[Mapping[str, Any]] = kernel[".args"]
    for i, argument in enumerate(arguments):
        if argument[".size"] != ARGUMENT_BYTES or argument[".offset"] != i * ARGUMENT_BYTES:
            raise TargetError(
                f"{kernel['.name']}: argument {argument.get('.name', i)} is not of {ARGUMENT_BYTES} bytes"
            )
    return Resources(
        arguments=tuple(argument[".name"] for argument in arguments),
        registers=kernel[".vgpr_count"],
        spilled=kernel[".vgpr_spill_count"] + kernel[".sgpr_spill_count"],
        scratch_bytes=kernel[".private_segment_fixed_size"],
        lds_bytes=kernel[".group_segment_fixed_size"],
        threads=kernel[".max_flat_workgroup_size"],
    )
