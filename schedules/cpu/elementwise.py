"""Any elementwise expression: each value of the result is computed in registers from what the inputs hold.

Bytes per token: those of the inputs that are read and of the result, once each.  Casts, slices, permutations and
concatenations are changes of an index.  A row of 2,048 bf16 values takes less than waking the other cores does, so
that small results are computed serially.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from tvm import tirx
from tvm.ir import Range
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.sym.analyzer import Analyzer
from tvm.tirx.script.builder import ir as build

from vllm_compile.expression import Expression, read_expression
from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from ..arguments import bind_arguments
from ..family import Config, KernelFamily, Variant
from ..vector_evaluator import VectorEvaluator, bits

# 16 K values take some 3 microseconds, waking OpenMP's threads 2 to 5: from here two cores gain.
PARALLEL_VALUES = 1 << 14
# A work item is at most so many values of the last axis.
BLOCK = 1 << 12


def cuts(expression: Expression, node: int, axis: int) -> set[int]:
    """Where along an axis of a node's value a kernel has to go on in another way: between parts of a concat."""
    op, operands, shape, _, parameters = expression[node]
    if op == "concat" and parameters[0] == axis:
        starts = [sum(int(expression[part].shape[axis]) for part in operands[:i]) for i in range(len(operands))]
        inner = (
            {start + cut for cut in cuts(expression, part, axis)} | {start}
            for part, start in zip(operands, starts, strict=True)
        )
        return set().union(*inner) - {0}
    if op == "slice":
        begin, step = parameters[axis]
        found = cuts(expression, operands[0], axis)
        return {cut - begin for cut in found if 0 < cut - begin < shape[axis]} if step == 1 else set()
    if op == "permute":
        return cuts(expression, operands[0], parameters[axis])
    if op == "reshape":
        return set()
    aligned = ((i, axis + len(expression[i].shape) - len(shape)) for i in operands)
    return set().union(
        *(cuts(expression, i, a) for i, a in aligned if a >= 0 and expression[i].shape[a] == shape[axis])
    )


def elementwise(spec: OpSpec, target: Target, parallel: bool) -> tirx.PrimFunc:
    """inputs of any shapes -> [T, ...]"""
    expression = read_expression(spec.attribute("expression"))
    (out,) = spec.outputs
    lanes, result = target.vector_lanes, len(expression) - 1
    *middle, last = out.sizes()[1:] or [1]
    starts = sorted(cuts(expression, result, len(expression[result].shape) - 1)) if len(out.shape) > 1 else []
    ranges = list(zip([0, *starts], [*starts, last], strict=True))
    block = BLOCK if last > BLOCK and not starts else last
    blocks = -(-last // block)
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        tokens, buffers = bind_arguments(spec)
        inputs = {name: bits(buffer) for name, buffer in buffers.items() if name != "out"}
        rows = prod(middle)
        with (T.parallel if parallel else T.serial)(0, tokens * (rows * blocks)) as item:
            analyzer = Analyzer()
            t = T.Bind(T.truncdiv(item, T.int64(rows * blocks)))
            rest = T.Bind(item - t * (rows * blocks))
            row = T.Bind(T.truncdiv(rest, T.int64(blocks)))
            part = T.Bind(rest - row * blocks)
            where = [t]
            for i, dim in enumerate(middle):
                inner = prod(middle[i + 1 :])
                coordinate = T.Bind(T.truncmod(T.truncdiv(row, T.int64(inner)), T.int64(dim)))
                analyzer.bind(coordinate, Range.from_min_extent(T.int64(0), T.int64(dim)))
                where.append(coordinate)
            analyzer.bind(part, Range.from_min_extent(T.int64(0), T.int64(blocks)))

            def columns(first, count: int) -> None:
                """Values `first` to `first + count` of the row."""

                def index(lane: tirx.Expr) -> list[tirx.Expr]:
                    return [*where, first + lane][: len(out.shape)]

                values = VectorEvaluator(expression, inputs, analyzer, count)
                lead = [T.int64(0)] * (len(expression[result].shape) - len(out.shape))
                registers = values.value(result, lambda lane: [*lead, *index(lane)])
                values.store(buffers["out"], index, lambda lane: T.Cast(out.dtype, registers[lane]))

            for begin, end in ranges:
                size = block if blocks > 1 else end - begin
                first = begin + part * block if blocks > 1 else T.int64(begin)
                # The last block of a row overlaps the one before it.
                first = T.Bind(T.min(first, T.int64(last - block))) if blocks > 1 else first
                if blocks > 1:
                    analyzer.bind(first, Range.from_min_extent(T.int64(0), T.int64(last - block + 1)))
                if size >= lanes:
                    with T.serial(0, T.int64(size // lanes)) as i:
                        analyzer.bind(i, Range.from_min_extent(T.int64(0), T.int64(size // lanes)))
                        columns(first + i * lanes, lanes)
                if size % lanes:
                    columns(first + size // lanes * lanes, size % lanes)
    return builder.get()


@dataclass(frozen=True)
class Elementwise(KernelFamily):
    """`elementwise` for every expression."""

    name: str = "cpu.elementwise"
    op: str = "elementwise"

    def serves(self, spec: OpSpec, target: Target) -> bool:
        return spec.op == self.op

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        tokens = -(-PARALLEL_VALUES // max(1, prod(spec.outputs[0].sizes()[1:])))
        serial = (Variant(1, {"parallel": False}),) if tokens > 1 else ()
        return (*serial, Variant(tokens, {"parallel": True}))

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        return elementwise(spec, target, config["parallel"])
