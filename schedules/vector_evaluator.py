"""Elementwise expressions in TIR: values in vector registers of a CPU, or in those of a GPU's lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.script import tirx as T
from tvm.sym.analyzer import Analyzer

from vllm_compile.expression import Expression, Node

from .evaluator import Evaluator, Index
from .rounding import rounded
from .vector_math import FUNCTIONS


def bits(buffer: tirx.Buffer) -> tirx.Buffer:
    """The same memory as integers, if it holds bfloat16: TVM mistakes such values where they are bound to a name."""
    if buffer.dtype == "float32":
        return buffer
    return T.decl_buffer(buffer.shape, "uint16", data=buffer.data, align=buffer.data_alignment)


class VectorEvaluator(Evaluator[tirx.Buffer]):
    """A value is a buffer of `count` registers: TVM would put a pure value that has only a name into each of its uses.

    Inputs of bfloat16 are given as their bits (`bits`); `scope` is where registers are in TIR.
    """

    def __init__(
        self,
        expression: Expression,
        inputs: dict[str, tirx.Buffer],
        analyzer: Analyzer,
        count: int,
        scope: str = "global",
    ) -> None:
        super().__init__(expression, analyzer, count)
        self._inputs, self._scope = inputs, scope

    def store(self, buffer: tirx.Buffer, index: Index, value: Callable[[tirx.Expr], tirx.Expr]) -> None:
        """buffer[index(lane)] = value(lane) for all lanes."""
        with T.vectorized(0, T.int64(self._count)) as lane:
            self._bounded(lane)
            T.buffer_store(buffer, value(lane), self._simple(index(lane)))

    def load(self, node: Node, index: Index) -> tirx.Buffer:
        return self._lanes(lambda lane: self._element(node, self._simple(index(lane))))

    def constant(self, number: float) -> tirx.Buffer:
        return self._bind(T.broadcast(T.float32(number), self._count) if self._count > 1 else T.float32(number))

    def apply(self, node: Node, operands: Sequence[tirx.Buffer]) -> tirx.Buffer:
        values = list(map(self._vector, operands))
        if node.op == "cast":
            result = values[0]
        elif node.op == "power":
            result = values[0]
            for _ in range(node.parameters[0] - 1):
                result = result * values[0]
        else:
            result = FUNCTIONS[node.op](lambda value: self._vector(self._bind(value)), *values)
        return self._bind(result if node.dtype == "float32" else rounded(self._vector(self._bind(result)), node.dtype))

    def select(self, first: Callable[[tirx.Expr], tirx.Expr], a: tirx.Buffer, b: tirx.Buffer) -> tirx.Buffer:
        return self._lanes(lambda lane: T.Select(first(lane), a[lane], b[lane]))

    def _lanes(self, value: Callable[[tirx.Expr], tirx.Expr]) -> tirx.Buffer:
        registers = T.alloc_buffer((self._count,), "float32", scope=self._scope)
        self.store(registers, lambda lane: [lane], value)
        return registers

    def _bind(self, vector: tirx.Expr) -> tirx.Buffer:
        """Registers that hold a vector."""
        registers = T.alloc_buffer((self._count,), "float32", scope=self._scope)
        T.buffer_store(registers, vector, [T.ramp(0, 1, self._count) if self._count > 1 else 0])
        return registers

    def _vector(self, registers: tirx.Buffer) -> tirx.Expr:
        return registers.vload([0], f"float32x{self._count}") if self._count > 1 else registers[0]

    def _element(self, node: Node, index: list[tirx.Expr]) -> tirx.Expr:
        buffer = self._inputs[node.parameters[0]]
        # The leading unit axes of the model's batch are not in memory.
        value = buffer[index[len(index) - len(buffer.shape) :] if index else [0]]
        if node.dtype == "float32":
            return value
        return T.reinterpret("float32", T.shift_left(T.Cast("uint32", value), T.uint32(16)))
