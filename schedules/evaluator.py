"""The values of an elementwise expression, node by node, for neighbours on the last axis of the result.

Casts, slices, permutations, reshapes and concatenations are changes of an index, the same on every target; how a target
holds a value, loads it and computes with it is a subclass's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from tvm import tirx
from tvm.ir import Range
from tvm.ir.prim import expr_deep_equal
from tvm.script import tirx as T
from tvm.sym.analyzer import Analyzer

from vllm_compile.expression import Expression, Node
from vllm_compile.spec import Sym

# An index as a function of the lane.
Index = Callable[[tirx.Expr], Sequence[tirx.Expr]]
Value = TypeVar("Value")


class Evaluator(ABC, Generic[Value]):
    """Emits the values of an expression's nodes for `count` neighbours on the last axis, each node once.

    A `Value` is what holds a node's float32 values of all lanes, rounded to the node's dtype.
    """

    def __init__(self, expression: Expression, analyzer: Analyzer, count: int) -> None:
        self._expression, self._analyzer, self._count = expression, analyzer, count
        self._known: list[tuple[int, tuple[tirx.Expr, ...], Value]] = []
        self._lane = self._bounded(tirx.Var("lane", "int64"))

    @abstractmethod
    def load(self, node: Node, index: Index) -> Value:
        """What an input holds at `index`."""

    @abstractmethod
    def constant(self, number: float) -> Value:
        """The same number in all lanes."""

    @abstractmethod
    def apply(self, node: Node, operands: Sequence[Value]) -> Value:
        """What a cast, a power or a function of one or two values makes of its operands."""

    @abstractmethod
    def select(self, first: Callable[[tirx.Expr], tirx.Expr], a: Value, b: Value) -> Value:
        """`a` in the lanes where `first(lane)`, `b` in the others."""

    def value(self, number: int, index: Index) -> Value:
        """Node `number` at `index`."""
        at = tuple(self._simple(index(self._lane)))
        for known, where, value in self._known:
            if known == number and all(expr_deep_equal(a, b) for a, b in zip(at, where, strict=True)):
                return value
        value = self._emit(self._expression[number], index)
        self._known.append((number, at, value))
        return value

    def _bounded(self, lane: tirx.Var) -> tirx.Var:
        self._analyzer.bind(lane, Range.from_min_extent(T.int64(0), T.int64(self._count)))
        return lane

    def _simple(self, index: Sequence[tirx.Expr]) -> list[tirx.Expr]:
        return [self._analyzer.simplify(i) for i in index]

    def _emit(self, node: Node, index: Index) -> Value:
        operands = node.operands
        match node.op:
            case "input":
                return self.load(node, index)
            case "constant":
                return self.constant(node.parameters[0])
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
        values = [self.value(i, self._broadcast(index, self._expression[i].shape)) for i in operands]
        return self.apply(node, values)

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

    def _concat(self, node: Node, index: Index) -> Value:
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
            result = value if result is None else self._before(index, axis, start + size, value, result)
        assert result is not None
        return result

    def _inside(self, index: Index, axis: int, start: int, size: int) -> Index:
        """`index` into a part; a lane of another part reads some value of this one, which is not taken."""

        def of(lane: tirx.Expr) -> tirx.Expr:
            return index(lane)[axis] - start

        if self._analyzer.can_prove(of(self._lane) >= 0) and self._analyzer.can_prove(of(self._lane) < size):
            return self._moved(index, axis, of)
        first, count = of(T.int64(0)), self._count
        neighbours = self._analyzer.can_prove(of(self._lane) - first == self._lane)
        if neighbours and size % count == 0 and self._analyzer.can_prove(T.floormod(first, count) == 0):
            # All lanes lie in the part, or none, and stay side by side.
            return self._moved(index, axis, lambda lane: T.max(T.min(first, T.int64(size - count)), T.int64(0)) + lane)
        return self._moved(index, axis, lambda lane: T.max(T.min(of(lane), T.int64(size - 1)), T.int64(0)))

    @staticmethod
    def _moved(index: Index, axis: int, to: Callable[[tirx.Expr], tirx.Expr]) -> Index:
        return lambda lane: [to(lane) if i == axis else where for i, where in enumerate(index(lane))]

    def _before(self, index: Index, axis: int, end: int, before: Value, behind: Value) -> Value:
        return self.select(lambda lane: index(lane)[axis] < end, before, behind)
