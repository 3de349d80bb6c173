"""Any elementwise expression: a lane computes eight neighbours of a row of the result from what the inputs hold.

Bytes per token: those of the inputs that are read and of the result, once each; slices, permutations and concatenations
are changes of an index, and what lies side by side in memory is read 16 bytes at a time.  The weighted sum of two
experts' results and the residual (Mixtral-8x7B, 4,096 wide) is 32 KiB a token and 4 operations a value: a launch alone
for few tokens, 51 us for 8,192 of them at an MI300X's 5.3 TB/s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from tvm import tirx
from tvm.ir import Range
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.sym.analyzer import Analyzer
from tvm.tirx.script.builder import ir as build

from vllm_compile.expression import read_expression
from vllm_compile.spec import OpSpec
from vllm_compile.targets.rocm import RocmTarget

from ..arguments import bind_arguments
from ..family import Config, KernelFamily
from ..vector_evaluator import VectorEvaluator, bits
from .norm import ALIGN, VECTOR, threads_for


class _LaneEvaluator(VectorEvaluator):
    """A value is in registers of a lane."""

    def select(self, first: Callable[[tirx.Expr], tirx.Expr], a: tirx.Buffer, b: tirx.Buffer) -> tirx.Buffer:
        """A branch where all eight neighbours lie on the same side."""
        return self._lanes(lambda i: T.if_then_else(self._analyzer.simplify(first(i)), a[i], b[i]))


def elementwise(spec: OpSpec) -> tirx.PrimFunc:
    """inputs of any shapes -> [T, ...]; a thread block has neighbouring vectors of one token's result."""
    expression = read_expression(spec.attribute("expression"))
    (out,) = spec.outputs
    *middle, last = out.sizes()[1:] or [1]
    count = VECTOR if last % VECTOR == 0 else 1
    extents = [*middle, last // count]
    items = prod(extents)
    threads = threads_for(items)
    lead = [T.int64(0)] * (len(expression[-1].shape) - len(out.shape))
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        tokens, buffers = bind_arguments(spec, align=ALIGN)
        inputs = {name: IRBuilder.name(name, bits(buffer)) for name, buffer in buffers.items() if name != "out"}
        with (
            T.thread_binding(tokens, thread="blockIdx.x") as t,
            T.thread_binding(T.int64(-(-items // threads)), thread="blockIdx.y") as part,
            T.thread_binding(T.int64(threads), thread="threadIdx.x") as thread,
        ):
            item = T.Bind(part * threads + thread)
            analyzer, place = Analyzer(), []
            for axis, extent in enumerate(extents):
                inner = prod(extents[axis + 1 :])
                coordinate = T.Bind(T.truncmod(T.truncdiv(item, T.int64(inner)), T.int64(extent)))
                analyzer.bind(coordinate, Range.from_min_extent(T.int64(0), T.int64(extent)))
                place.append(coordinate)

            def index(lane: tirx.Expr) -> list[tirx.Expr]:
                return [t, *place[:-1], place[-1] * count + lane][: len(out.shape)]

            with T.If(item < items), T.Then():
                values = _LaneEvaluator(expression, inputs, analyzer, count, scope="local")
                registers = values.value(len(expression) - 1, lambda lane: [*lead, *index(lane)])
                values.store(buffers["out"], index, lambda lane: T.Cast(out.dtype, registers[lane]))
    return builder.get()


@dataclass(frozen=True)
class Elementwise(KernelFamily):
    """`elementwise` for every expression of bf16 and float32 tensors."""

    name: str = "rocm.elementwise"
    op: str = "elementwise"

    def serves(self, spec: OpSpec, target: RocmTarget) -> bool:
        tensors = [*(tensor for _, tensor in spec.inputs), *spec.outputs]
        return all(tensor.dtype in ("bfloat16", "float32") and tensor.shape for tensor in tensors)

    def build(self, spec: OpSpec, config: Config, target: RocmTarget) -> tirx.PrimFunc:
        return elementwise(spec)
