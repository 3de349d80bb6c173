"""Runs the PrimFuncs of ROCm kernels on a CPU: TVM's OpenCL code of them, compiled and run by PoCL, through ctypes.

The schedule is the same: thread blocks, waves, shared memory, barriers; only the instructions that TIR has no operator
for are functions of lanes.cl instead.  PoCL runs the work items of a group one after the other up to each barrier, so
that a barrier that is missing shows.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Mapping
from ctypes.util import find_library
from functools import cache
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Op
from tvm.script import tirx as T
from tvm.target.codegen import llvm_lookup_intrinsic_id
from tvm.tirx.build import codegen_build, split_host_device_mods

from vllm_compile.targets.rocm import MOST_THREADS

from .hip import Launch

LANES = Path(__file__).with_name("lanes.cl").read_text()
INTRINSICS = (
    "llvm.amdgcn.update.dpp.i32",
    "llvm.amdgcn.ds.bpermute",
    "llvm.amdgcn.readfirstlane.i32",
    "llvm.amdgcn.rcp.f32",
    "llvm.amdgcn.sched.barrier",
    "llvm.amdgcn.mfma.f32.16x16x16bf16.1k",
    "llvm.fma",
    "llvm.nearbyint",
)
TARGET = {"kind": "opencl", "max_num_threads": MOST_THREADS}
SCRATCH_BYTES = 16 * MOST_THREADS
PARAMETERS = re.compile(r"^__kernel void (\w+)\((.*)\) \{$", re.MULTILINE)
COMPUTED = re.compile(r"cse_v(\d+)")  # of TVM's elimination of common subexpressions
BUILD_LOG = 0x1183  # CL_PROGRAM_BUILD_LOG


def source(kernels: Mapping[str, tirx.PrimFunc]) -> str:
    """OpenCL C of `kernels` (symbol -> function); each has local memory for `lanes.cl` as its first argument."""
    functions = {
        symbol: _portable(function).with_attr("global_symbol", symbol).with_attr("tirx.noalias", True)
        for symbol, function in sorted(kernels.items())
    }
    machine = tvm.target.Target(TARGET, host=tvm.target.Target({"kind": "llvm"}))
    lower, _, finish_device = tirx.get_default_tir_pipeline(machine)
    lowered = lower(tirx.transform.BindTarget(machine)(tvm.IRModule(functions)))
    ((target, device),) = split_host_device_mods(lowered)[1].items()
    code = codegen_build(finish_device()(device), target).inspect_source("cl")
    return LANES + re.sub(r"(__kernel void \w+)\(", r"\1(__local int* scratch, ", code)


def _portable(function: tirx.PrimFunc) -> tirx.PrimFunc:
    names = {llvm_lookup_intrinsic_id(name): name for name in INTRINSICS}
    intrinsics = Op.get("tirx.call_llvm_pure_intrin"), Op.get("tirx.call_llvm_intrin")

    def replace(call: Call) -> Any:
        if not any(map(call.op.same_as, intrinsics)):
            return call
        name = names[int(call.args[0])].replace(".", "_")
        return T.call_extern(str(call.ty.dtype), name, *call.args[1:])

    return function.with_body(tvm_ffi.structural_map(function.body, (Call, replace)))


class OpenCLError(Exception):
    pass


@cache
def _device() -> tuple[Any, Any, Any, Any]:
    """The library, and a context and a queue on PoCL's CPU."""
    library = find_library("OpenCL")
    if library is None:
        raise OpenCLError("no libOpenCL; apt-get install pocl-opencl-icd ocl-icd-libopencl1")
    cl = ctypes.CDLL(library)
    for name in ("clCreateContext", "clCreateCommandQueue", "clCreateProgramWithSource", "clCreateKernel"):
        getattr(cl, name).restype = ctypes.c_void_p
    platform, device, status = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    _check(cl.clGetPlatformIDs(1, ctypes.byref(platform), None), "clGetPlatformIDs")
    _check(cl.clGetDeviceIDs(platform, ctypes.c_uint64(2), 1, ctypes.byref(device), None), "clGetDeviceIDs")
    context = ctypes.c_void_p(cl.clCreateContext(None, 1, ctypes.byref(device), None, None, ctypes.byref(status)))
    _check(status.value, "clCreateContext")
    queue = ctypes.c_void_p(cl.clCreateCommandQueue(context, device, ctypes.c_uint64(0), ctypes.byref(status)))
    _check(status.value, "clCreateCommandQueue")
    return cl, device, context, queue


def available() -> bool:
    """True if there is an OpenCL device of a CPU."""
    try:
        _device()
    except OpenCLError:
        return False
    return True


def _check(status: int, function: str) -> None:
    if status:
        raise OpenCLError(f"{function} answers {status}")


class Program:
    """Kernels, compiled; called with a launch as HIP gets it."""

    def __init__(self, kernels: Mapping[str, tirx.PrimFunc]) -> None:
        cl, device, context, _ = _device()
        code, status = source(kernels), ctypes.c_int()
        self._parameters = {name: declared.split(",")[1:] for name, declared in PARAMETERS.findall(code)}
        text = ctypes.c_char_p(code.encode())
        self._program = ctypes.c_void_p(
            cl.clCreateProgramWithSource(context, 1, ctypes.byref(text), None, ctypes.byref(status))
        )
        _check(status.value, "clCreateProgramWithSource")
        if cl.clBuildProgram(self._program, 1, ctypes.byref(device), b"-cl-opt-disable", None, None):
            log = ctypes.create_string_buffer(1 << 16)
            cl.clGetProgramBuildInfo(self._program, device, BUILD_LOG, ctypes.c_size_t(len(log)), log, None)
            raise OpenCLError(log.value.decode())

    def __call__(self, launch: Launch) -> None:
        cl, _, _, queue = _device()
        status = ctypes.c_int()
        kernel = ctypes.c_void_p(cl.clCreateKernel(self._program, launch.kernel.encode(), ctypes.byref(status)))
        _check(status.value, f"clCreateKernel {launch.kernel}")
        _check(cl.clSetKernelArg(kernel, 0, ctypes.c_size_t(SCRATCH_BYTES), None), "clSetKernelArg")
        for i, name in enumerate(self._names(launch), start=1):
            value = launch.arguments[name]
            if name in launch.pointers:
                _check(cl.clSetKernelArgSVMPointer(kernel, i, ctypes.c_void_p(value)), f"argument {name}")
            else:
                word = ctypes.c_int64(value)
                _check(cl.clSetKernelArg(kernel, i, ctypes.c_size_t(8), ctypes.byref(word)), f"argument {name}")
        sizes = ctypes.c_size_t * 3
        items = sizes(*(grid * block for grid, block in zip(launch.grid, launch.block, strict=True)))
        group = sizes(*launch.block)
        _check(cl.clEnqueueNDRangeKernel(queue, kernel, 3, None, items, group, 0, None, None), launch.kernel)
        _check(cl.clFinish(queue), "clFinish")
        cl.clReleaseKernel(kernel)

    def _names(self, launch: Launch) -> list[str]:
        """The launch's arguments, in the order of this program's parameters.

        What TVM computes on the host for all threads has a number: another one here than in the code object, as other
        code was looked at for what is common, but in the same order.
        """
        parameters = [declared.split()[-1].removesuffix("_ptr") for declared in self._parameters[launch.kernel]]
        computed = zip(_computed(parameters), _computed(launch.arguments), strict=True)
        names = dict(zip(parameters, parameters, strict=True)) | dict(computed)
        return [names[parameter] for parameter in parameters]


def _computed(names: Iterable[str]) -> list[str]:
    numbers = (COMPUTED.fullmatch(name) for name in names)
    return [match[0] for match in sorted(filter(None, numbers), key=lambda match: int(match[1]))]
