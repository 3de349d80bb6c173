"""A PrimFunc around a device function: checks the arguments, computes the grid, launches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import DTYPE_BYTES, OpSpec, Sym, TensorSpec

# Start while the kernel before runs; it is waited for before anything but weights is read.
DEPENDENT_LAUNCH = "tirx.use_programtic_dependent_launch"
DYNAMIC_SHARED_MEMORY = "tirx.use_dyn_shared_memory"
GRID = ("blockIdx.x", "blockIdx.y", "blockIdx.z")
THREADS = "threadIdx.x"
RESIDENT = "tirx.launch_bounds_min_blocks_per_sm"
CLUSTER = "clusterCtaIdx.x"
VECTOR_BYTES = 16  # what one thread reads or writes at once; tensors of floats start at a multiple


@dataclass(frozen=True)
class Launch:
    """How a device function is run: thread blocks by axis, threads and bytes of shared memory of each.

    So many neighbours along the first axis as `cluster` says can read each other's shared memory.  `resident` is how
    many a multiprocessor has room for, if that is known: the assembler gives threads the registers that this leaves.
    It guesses otherwise, and may spill to make room for more.  A call for more tokens than `most_tokens` is refused.
    """

    grid: Sequence[Any]
    threads: int
    shared_bytes: int = 0
    cluster: int = 1
    resident: int | None = None
    most_tokens: int | None = None


@dataclass(frozen=True)
class Call:
    """A kernel's arguments, bound: what a device function is called with.

    Attributes:
        tensors: each input by name, and the outputs as out (or out_0, out_1, ...).
        dims: the dimensions that are bound at each call.
    """

    tensors: Mapping[str, tirx.Buffer]
    dims: Mapping[Sym, tirx.Var]

    def data(self, name: str) -> Any:
        """Address of a tensor; null if the call has none such."""
        return self.tensors[name].data if name in self.tensors else T.reinterpret("handle", T.uint64(0))

    def strides(self, name: str) -> list[Any]:
        """Strides of a tensor in elements, but for the last, which is 1."""
        return list(self.tensors[name].strides)[:-1]


def kernel(
    spec: OpSpec,
    header: str,
    function: str,
    launch: Callable[[Call], Launch],
    arguments: Callable[[Call], Sequence[Any]],
    stored: Mapping[str, TensorSpec] | None = None,
    source: str = "",
) -> tirx.PrimFunc:
    """The kernel `kernel(*inputs, *outputs)` of `spec`.

    Args:
        header: the file of this folder that defines the device function.
        function: its name in namespace vllm_compile, with template arguments.
        launch: the grid, given the arguments.
        arguments: what to call it with; the shared memory's address follows if there is any.
        stored: weights that are stored otherwise than `spec` says.
        source: the device function itself where it is generated, in terms of what `header` defines.
    """
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        named = [*spec.inputs, *zip(_output_names(spec), spec.outputs, strict=True)]
        handles = [T.arg(name, T.handle()) for name, _ in named]
        dims: dict[Sym, tirx.Var] = {}
        tensors = {}
        for handle, (name, plain) in zip(handles, named, strict=True):
            tensor = (stored or {}).get(name, plain)
            shape = [_dimension(dim, dims) for dim in tensor.shape]
            strides = None
            if tensor.strided:
                strides = [IRBuilder.name(f"{name}_stride_{i}", T.int64()) for i in range(len(shape) - 1)] + [1]
            align = VECTOR_BYTES if not tensor.dtype.startswith("int") else DTYPE_BYTES[tensor.dtype]
            buffer = T.match_buffer(handle, shape, tensor.dtype, strides=strides, align=align)
            tensors[name] = IRBuilder.name(name, buffer)
        call = Call(tensors, dims)
        how = launch(call)
        extents, tags = [*how.grid, how.threads], [*GRID[: len(how.grid)], THREADS]
        if how.cluster > 1:
            extents, tags = [how.cluster, *extents], [CLUSTER, *tags]
        T.func_attr(
            {
                "tirx.kernel_launch_params": [
                    *tags,
                    DEPENDENT_LAUNCH,
                    *([DYNAMIC_SHARED_MEMORY] if how.shared_bytes else []),
                ]
            }
        )
        if how.most_tokens is not None:
            name = function.partition("<")[0]
            what = f"{name} is made for no more than {how.most_tokens} tokens: call another kernel for more"
            with T.Assert(call.dims[Sym.TOKENS] <= how.most_tokens, what, "ValueError"):
                pass
        with ExitStack() as bindings:  # the first is the outermost
            for extent, tag in zip(extents, tags, strict=True):
                bindings.enter_context(T.thread_binding(extent, thread=tag))
            if how.resident is not None:
                bindings.enter_context(T.attr(0, RESIDENT, how.resident))
            values = list(arguments(call))
            if how.shared_bytes:
                values.append(T.alloc_buffer((how.shared_bytes,), "uint8", scope="shared.dyn").data)
            code = f'#include "{header}"\n{source}'
            T.evaluate(T.cuda.func_call(f"vllm_compile::{function}", *values, source_code=code, return_type="void"))
    return builder.get()


def _output_names(spec: OpSpec) -> list[str]:
    return ["out"] if len(spec.outputs) == 1 else [f"out_{i}" for i in range(len(spec.outputs))]


def _dimension(dim: int | Sym, bound: dict[Sym, tirx.Var]) -> Any:
    if not isinstance(dim, Sym):
        return dim
    if dim not in bound:
        bound[dim] = IRBuilder.name(dim.name.lower(), T.int64())
    return bound[dim]
