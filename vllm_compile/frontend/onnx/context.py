"""What the converters of an ONNX graph's operators see, and what they have made so far."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tvm import relax, tirx

from vllm_compile.errors import UnsupportedError
from vllm_compile.ops import EMBEDDING
from vllm_compile.spec import Sym

from .graph import OnnxGraph
from .tensors import FLOAT, FLOATS
from .values import GraphInput, Weight

# Parameters that the passes, and we, give the model.
RESERVED = re.compile(
    r"input_ids|positions|position_table_\d+|kv_\d+|block_table|seq_lens|query_start_loc|slot_mapping|hidden|x"
)


@dataclass(frozen=True)
class Names:
    """What a graph calls the inputs and the output that are known by their names."""

    input_ids: str = "input_ids"
    position_ids: str = "position_ids"
    logits: str = "logits"


@dataclass
class Context:
    """A graph on its way to Relax.

    Attributes:
        native: what the graph computes in.
        dtype: what that becomes.
        layers: attentions that were converted.
        wide: values in float32 by their names, where the graph's own float32 becomes a narrower dtype: of norms that
            are written out, which Hugging Face's models compute so whatever their dtype.
    """

    graph: OnnxGraph
    names: Names
    native: str
    dtype: str
    max_positions: int
    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    values: dict[str, Any] = field(default_factory=dict)
    layers: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    parameters: dict[Weight, relax.Var] = field(default_factory=dict)
    tables: dict[tuple[str, bool], tuple[relax.Var, torch.Tensor]] = field(default_factory=dict)
    rows: dict[tuple[str, bool], relax.Expr] = field(default_factory=dict)
    wide: dict[str, relax.Expr] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = tirx.Var(Sym.TOKENS, "int64")
        self.tokens = tokens
        self._widened: dict[str, relax.Expr] = {}
        self.input_ids = relax.Var("input_ids", relax.TensorType([tokens], "int32"))
        self.positions = relax.Var("positions", relax.TensorType([tokens], "int64"))

    def emit(self, expr: relax.Expr) -> relax.Var:
        return self.builder.emit(expr)

    def define(self, name: str, value: Any) -> None:
        """Give a value its name; one in float32 where that is narrowed is there in both dtypes."""
        if self.narrows and isinstance(value, relax.Expr) and str(value.ty.dtype) == "float32":
            self.wide[name] = value
            value = self.emit(relax.op.astype(value, self.dtype))
        self.values[name] = value

    @property
    def narrows(self) -> bool:
        """Whether the graph's float32 becomes a narrower dtype."""
        return self.native == "float32" != self.dtype

    def alike(self, *names: str) -> list[relax.Expr]:
        """Operands of an operator on each element: in float32 if one is, until they meet a weight."""
        meet_weight = any(isinstance(self.value(name), Weight) for name in names)
        if meet_weight or self.wide.keys().isdisjoint(names):
            return [self.operand(name) for name in names]
        return [self.in_float32(name) for name in names]

    def in_float32(self, name: str) -> relax.Expr:
        """The value called `name` in float32."""
        value = self.value(name)
        if isinstance(value, np.ndarray) and value.size == 1:
            return relax.const(value.item(), "float32")
        if name in self.wide:
            return self.wide[name]
        if name not in self._widened:
            self._widened[name] = self.emit(relax.op.astype(self.operand(name), "float32"))
        return self._widened[name]

    def operand(self, name: str) -> relax.Expr:
        """The value called `name`, as Relax has it."""
        value = self.value(name)
        if isinstance(value, Weight):
            return self.parameter(value)
        if isinstance(value, np.ndarray) and value.size == 1:
            return relax.const(value.item(), self.constant_dtype(value))
        if not isinstance(value, relax.Expr):
            what = f"the graph's input {name}" if isinstance(value, GraphInput) else f"{name}, of an unusual shape,"
            raise UnsupportedError(f"{what} cannot be an operand here")
        return value

    def value(self, name: str) -> Any:
        """The value called `name`, of whatever kind."""
        if name in self.values:
            return self.values[name]
        if name in self.graph.constants:
            return self.graph.constants[name]
        if name in self.graph.inputs:
            return GraphInput(name)
        stored = self.graph.initializers
        if name not in stored:
            raise UnsupportedError(f"{name} is made by no node before")
        numbers = stored.whole_numbers(name)
        if numbers is not None:
            return numbers
        if not stored.shape(name):
            return np.asarray(stored.read(name).item(), "float32" if stored.element_type(name) == FLOAT else "float16")
        return Weight(name, stored.shape(name))

    def numbers(self, name: str) -> list[int]:
        """A list of whole numbers that is known when the graph is read."""
        value = self.value(name)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
            raise UnsupportedError(f"{name} is not known before the graph runs")
        return [int(number) for number in value.reshape(-1)]

    def parameter(self, weight: Weight) -> relax.Var:
        """The parameter that holds a weight."""
        if weight not in self.parameters:
            taken = {var.name for var in self.parameters.values()}
            name = "".join(c if c.isalnum() else "_" for c in weight.name)
            while name in taken or RESERVED.fullmatch(name):
                name += "_"
            kind = self.float_dtype(self.graph.initializers.element_type(weight.name))
            self.parameters[weight] = relax.Var(name, relax.TensorType(list(weight.shape), kind))
        return self.parameters[weight]

    def float_dtype(self, element: int) -> str:
        """What ONNX's element type becomes: the graph's own dtype what was asked for, float32 beside it itself."""
        name = FLOATS.get(element)
        if name not in (self.native, "float32"):
            raise UnsupportedError(
                f"numbers of ONNX's element type {element} in a graph of {self.native} are not supported"
            )
        return self.dtype if name == self.native else "float32"

    def constant_dtype(self, value: np.ndarray) -> str:
        """Of a number in the graph; a whole one is an exponent."""
        return self.float_dtype(FLOAT) if str(value.dtype) == "float32" else self.dtype

    def table_rows(self, name: str, interleaved: bool) -> relax.Expr:
        """Row of each token's position in a cache of cosines or sines [P, D / 2], as [1, 1, T, D].

        Each angle stands there twice: in both halves, or for both neighbours.
        """
        if (name, interleaved) not in self.rows:
            if name not in self.graph.initializers:
                raise UnsupportedError(f"angles {name} that are no initializer are not supported")
            half = self.graph.initializers.read(name)[: self.max_positions]
            twice = half.repeat_interleave(2, -1) if interleaved else torch.cat([half, half], dim=-1)
            table = twice.to(getattr(torch, self.dtype))
            var = relax.Var(f"position_table_{len(self.tables)}", relax.TensorType(list(table.shape), self.dtype))
            self.tables[name, interleaved] = (var, table)
            rows = self.emit(EMBEDDING({"ids": self.positions, "table": var}))
            rows = self.emit(relax.op.expand_dims(rows, 0))
            self.rows[name, interleaved] = self.emit(relax.op.expand_dims(rows, 1))
        return self.rows[name, interleaved]
