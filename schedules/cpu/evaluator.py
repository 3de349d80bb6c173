"""The values of an elementwise expression, node by node, for neighbours on the last axis of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.ir import Range
from tvm.ir.prim import expr_deep_equal
from tvm.script import tirx as T
from tvm.sym.analyzer import Analyzer

from vllm_compile.expression import Expression, Node
from vllm_compile.spec import Sym

from ..rounding import rounded
from .vector_math import FUNCTIONS

# An index as a function of the lane.
Index = Callable[[tirx.Expr], Sequence[tirx.Expr]]


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
    """Emits the values of an expression's nodes for `count` neighbours on the last axis, each node once.

    A value is a buffer of `count` registers: TVM would put a pure value that has only a name into each of its uses.
    An index is a function of the lane.  Inputs of bfloat16 are given as their bits.
    """

    def __init__(self, expression: Expression, inputs: dict[str, tirx.Buffer], analyzer: Analyzer, count: int) -> None:
        self._expression, self._inputs, self._analyzer, self._count = expression, inputs, analyzer, count
        self._known: list[tuple[int, tuple[tirx.Expr, ...], tirx.Buffer]] = []
        self._lane = self._bounded(tirx.Var("lane", "int64"))

    def store(self, buffer: tirx.Buffer, index: Index, value: Callable[[tirx.Expr], tirx.Expr]) -> None:
        """buffer[index(lane)] = value(lane) for all lanes."""
        with T.vectorized(0, T.int64(self._count)) as lane:
            self._bounded(lane)
            T.buffer_store(buffer, value(lane), self._simple(index(lane)))

    def value(self, number: int, index: Index) -> tirx.Buffer:
        """Node `number` at `index`, in float32, rounded to the node's dtype."""
        at = tuple(self._simple(index(self._lane)))
        for known, where, registers in self._known:
            if known == number and all(expr_deep_equal(a, b) for a, b in zip(at, where, strict=True)):
                return registers
        registers = self._emit(self._expression[number], index)
        self._known.append((number, at, registers))
        return registers

    def _bounded(self, lane: tirx.Var) -> tirx.Var:
        self._analyzer.bind(lane, Range.from_min_extent(T.int64(0), T.int64(self._count)))
        return lane

    def _simple(self, index: Sequence[tirx.Expr]) -> list[tirx.Expr]:
        return [self._analyzer.simplify(i) for i in index]

    def _emit(self, node: Node, index: Index) -> tirx.Buffer:
        operands = node.operands
        match node.op:
            case "input":
                return self._lanes(lambda lane: self._load(node, self._simple(index(lane))))
            case "constant":
                return self._bind(self._splat(node.parameters[0]))
            case "slice":
                where = node.parameters
                return self.value(
                    operands[0],
                    lambda lane: [begin + i * step for i, (begin, step) in zip(index(lane), where, strict=True)],
                )
            case "permute":
                axes = [node.parameters.index(axis) for axis in range(len(node.shape))]
                return self.value(operands[0], lambda lane: [index(lane)[axis] for axis in axes])
            case "reshape":
                inner = self._expression[operands[0]].shape
                return self.value(operands[0], lambda lane: self._reshaped(index(lane), node.shape, inner))
            case "concat":
                return self._concat(node, index)
        values = [self._vector(self.value(i, self._broadcast(index, self._expression[i].shape))) for i in operands]
        if node.op == "cast":
            result = values[0]
        elif node.op == "power":
            result = values[0]
            for _ in range(node.parameters[0] - 1):
                result = result * values[0]
        else:
            result = FUNCTIONS[node.op](lambda value: self._vector(self._bind(value)), *values)
        return self._bind(result if node.dtype == "float32" else rounded(self._vector(self._bind(result)), node.dtype))

    def _lanes(self, value: Callable[[tirx.Expr], tirx.Expr]) -> tirx.Buffer:
        registers = T.alloc_buffer((self._count,), "float32")
        self.store(registers, lambda lane: [lane], value)
        return registers

    def _bind(self, vector: tirx.Expr) -> tirx.Buffer:
        """Registers that hold a vector."""
        registers = T.alloc_buffer((self._count,), "float32")
        T.buffer_store(registers, vector, [T.ramp(0, 1, self._count) if self._count > 1 else 0])
        return registers

    def _vector(self, registers: tirx.Buffer) -> tirx.Expr:
        return registers.vload([0], f"float32x{self._count}") if self._count > 1 else registers[0]

    def _splat(self, value: float) -> tirx.Expr:
        return T.broadcast(T.float32(value), self._count) if self._count > 1 else T.float32(value)

    def _load(self, node: Node, index: list[tirx.Expr]) -> tirx.Expr:
        buffer = self._inputs[node.parameters[0]]
        # The leading unit axes of the model's batch are not in memory.
        value = buffer[index[len(index) - len(buffer.shape) :] if index else [0]]
        if node.dtype == "float32":
            return value
        return T.reinterpret("float32", T.shift_left(T.Cast("uint32", value), T.uint32(16)))

    @staticmethod
    def _broadcast(index: Index, shape: tuple) -> Index:
        def inner(lane: tirx.Expr) -> list[tirx.Expr]:
            whole = index(lane)
            aligned = whole[len(whole) - len(shape) :]
            return [T.int64(0) if dim == 1 else i for i, dim in zip(aligned, shape, strict=True)]

        return inner

    def _reshaped(self, index: Sequence[tirx.Expr], shape: tuple, inner: tuple) -> list[tirx.Expr]:
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

    def _concat(self, node: Node, index: Index) -> tirx.Buffer:
        """The part that `index` lies in, chosen now where the lanes all lie in one."""
        axis = node.parameters[0]
        at, start = index(self._lane)[axis], int(node.shape[axis])
        result = None
        for part in reversed(node.operands):
            size = int(self._expression[part].shape[axis])
            start -= size
            if self._analyzer.can_prove(at < start):
                continue
            if self._analyzer.can_prove(at >= start + size):
                break
            value = self.value(part, self._inside(index, axis, start, size))
            result = value if result is None else self._select(index, axis, start + size, value, result)
        return result

    def _inside(self, index: Index, axis: int, start: int, size: int) -> Index:
        """`index` into a part; a lane of another part reads some value of this one, which is not taken."""
        inside = index(self._lane)[axis] - start
        certain = self._analyzer.can_prove(inside >= 0) and self._analyzer.can_prove(inside < size)

        def inner(lane: tirx.Expr) -> list[tirx.Expr]:
            where = list(index(lane))
            where[axis] = where[axis] - start
            if not certain:
                where[axis] = T.max(T.min(where[axis], T.int64(size - 1)), T.int64(0))
            return where

        return inner

    def _select(self, index: Index, axis: int, end: int, before: tirx.Buffer, behind: tirx.Buffer) -> tirx.Buffer:
        return self._lanes(lambda lane: T.Select(index(lane)[axis] < end, before[lane], behind[lane]))
