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
from tvm.ir.prim import expr_deep_equal
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.sym.analyzer import Analyzer
from tvm.tirx.script.builder import ir as build

from vllm_compile.expression import Expression, Node, read_expression
from vllm_compile.spec import DTYPE_BYTES, OpSpec, Sym
from vllm_compile.targets import Target

from ..family import Config, KernelFamily, Variant
from .rounding import rounded
from .vector_math import FUNCTIONS

# 16 K values take some 3 microseconds, waking OpenMP's threads 2 to 5: from here two cores gain.
PARALLEL_VALUES = 1 << 14
# A work item is at most so many values of the last axis.
BLOCK = 1 << 12

Index = tuple[tirx.Expr, ...]


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


class Evaluator:
    """Emits the values of an expression's nodes at an index, each once; bfloat16 inputs are given as their bits."""

    def __init__(self, expression: Expression, inputs: dict[str, tirx.Buffer], analyzer: Analyzer) -> None:
        self._expression, self._inputs, self._analyzer = expression, inputs, analyzer
        self._known: list[tuple[int, Index, tirx.Expr]] = []

    def value(self, number: int, index: Sequence[tirx.Expr]) -> tirx.Expr:
        """Node `number` at `index`, in float32, rounded to the node's dtype."""
        at = tuple(self._analyzer.simplify(i) for i in index)
        for known, where, result in self._known:
            if known == number and all(expr_deep_equal(a, b) for a, b in zip(at, where, strict=True)):
                return result
        node = self._expression[number]
        result = self._emit(node, at)
        if node.op not in ("constant", "slice", "permute", "reshape"):
            result = T.Bind(result)
        self._known.append((number, at, result))
        return result

    def _emit(self, node: Node, index: Index) -> tirx.Expr:
        operands = node.operands
        match node.op:
            case "input":
                return self._load(node, index)
            case "constant":
                return T.float32(node.parameters[0])
            case "slice":
                where = zip(index, node.parameters, strict=True)
                return self.value(operands[0], [begin + i * step for i, (begin, step) in where])
            case "permute":
                inner = dict(zip(node.parameters, index, strict=True))
                return self.value(operands[0], [inner[axis] for axis in range(len(index))])
            case "reshape":
                return self.value(operands[0], self._reshaped(index, node.shape, self._expression[operands[0]].shape))
            case "concat":
                return self._concat(node, index)
        values = [self.value(i, self._broadcast(index, self._expression[i].shape)) for i in operands]
        if node.op == "cast":
            return rounded(values[0], node.dtype)
        if node.op == "power":
            product = values[0]
            for _ in range(node.parameters[0] - 1):
                product = product * values[0]
            return rounded(product, node.dtype)
        return rounded(FUNCTIONS[node.op](*values), node.dtype)

    def _load(self, node: Node, index: Index) -> tirx.Expr:
        buffer = self._inputs[node.parameters[0]]
        # The leading unit axes of the model's batch are not in memory.
        value = buffer[list(index[len(index) - len(buffer.shape) :]) if index else [0]]
        if node.dtype == "float32":
            return value
        return T.reinterpret("float32", T.shift_left(T.Cast("uint32", value), T.uint32(16)))

    @staticmethod
    def _broadcast(index: Index, shape: tuple) -> list[tirx.Expr]:
        aligned = index[len(index) - len(shape) :]
        return [T.int64(0) if dim == 1 else i for i, dim in zip(aligned, shape, strict=True)]

    def _reshaped(self, index: Index, shape: tuple, inner: tuple) -> list[tirx.Expr]:
        """The index into `inner` of what stands at `index` of `shape`; up to the tokens, axes match or are units."""
        lead = 1 + shape.index(Sym.TOKENS) if Sym.TOKENS in shape else 0
        inner_lead = 1 + inner.index(Sym.TOKENS) if lead else 0
        same = inner_lead == lead
        token = list(index[:lead]) if same else [*([T.int64(0)] * (inner_lead - 1)), index[lead - 1]]
        flat: tirx.Expr = T.int64(0)
        for i, dim in zip(index[lead:], shape[lead:], strict=True):
            flat = flat * dim + i
        where: list[tirx.Expr] = []
        for dim in reversed(inner[inner_lead:]):
            where.insert(0, self._analyzer.simplify(T.floormod(flat, T.int64(dim))))
            flat = self._analyzer.simplify(T.floordiv(flat, T.int64(dim)))
        return [*token, *where]

    def _concat(self, node: Node, index: Index) -> tirx.Expr:
        """The part that `index` lies in, chosen now where the loop does not leave it."""
        axis = node.parameters[0]
        at, start = index[axis], int(node.shape[axis])
        result = None
        for part in reversed(node.operands):
            size = int(self._expression[part].shape[axis])
            start -= size
            if self._analyzer.can_prove(at < start):
                continue
            if self._analyzer.can_prove(at >= start + size):
                break
            inside = at - start
            if not (self._analyzer.can_prove(inside >= 0) and self._analyzer.can_prove(inside < size)):
                # Both sides are computed: what is not taken reads some value of its part.
                inside = T.max(T.min(inside, T.int64(size - 1)), T.int64(0))
            value = self.value(part, [*index[:axis], inside, *index[axis + 1 :]])
            result = value if result is None else T.Select(at < start + size, value, result)
        return result


def _bits(buffer: tirx.Buffer) -> tirx.Buffer:
    """The same memory as integers, if it holds bfloat16: TVM mistakes such values where they are bound to a name."""
    if buffer.dtype == "float32":
        return buffer
    return T.decl_buffer(buffer.shape, "uint16", data=buffer.data, align=2)


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
        named = (*spec.inputs, ("out", out))
        handles = [T.arg(name, T.handle()) for name, _ in named]
        tokens = T.int64()
        buffers = {}
        for handle, (name, tensor) in zip(handles, named, strict=True):
            shape = [tokens if dim == Sym.TOKENS else dim for dim in tensor.shape]
            buffers[name] = T.match_buffer(handle, shape or [1], tensor.dtype, align=DTYPE_BYTES[tensor.dtype])
        bits = {name: _bits(buffer) for name, buffer in buffers.items() if name != "out"}
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

            def columns(loop, first, size: int) -> None:
                """Values `first` to `first + size` of the row."""
                with loop(0, T.int64(size)) as j:
                    analyzer.bind(j, Range.from_min_extent(T.int64(0), T.int64(size)))
                    at = [*where, first + j]
                    lead = len(expression[result].shape) - len(out.shape)
                    values = Evaluator(expression, bits, analyzer)
                    index = [T.int64(0)] * lead + at[: len(out.shape)]
                    value = T.Cast(out.dtype, values.value(result, index))
                    T.buffer_store(buffers["out"], value, at[: len(out.shape)])

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
                        columns(T.vectorized, first + i * lanes, lanes)
                if size % lanes:
                    columns(T.serial, first + size // lanes * lanes, size % lanes)
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
