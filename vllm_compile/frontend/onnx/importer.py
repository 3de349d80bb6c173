"""An ONNX graph to Relax: the same operators, written in the same way, as a model of Hugging Face is imported to.

ONNX's batch and sequence are the one flat batch that a serving engine calls: [1, T, ...].  What a graph does with
its mask and its past keys and values, to know where each sequence ends, is left to the engine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax, tirx

from vllm_compile.errors import UnsupportedError
from vllm_compile.ops import EMBEDDING
from vllm_compile.relax_passes.base import clean
from vllm_compile.spec import Sym

from .attention import ATTENTION, angles_of, past_of
from .attention import CONVERTERS as ATTENTION_OPERATORS
from .graph import Node, OnnxGraph
from .layers import mark_layers
from .operators import CONVERTERS as PLAIN_OPERATORS
from .refusals import FLOATS, check_operators, native_dtype, place
from .shapes import CONVERTERS as SHAPE_OPERATORS
from .tensors import FLOAT
from .values import GraphInput, Weight

CONVERTERS = {**PLAIN_OPERATORS, **SHAPE_OPERATORS, **ATTENTION_OPERATORS}
CAST = "Cast"
# Parameters that the passes, and we, give the model.
RESERVED = re.compile(
    r"input_ids|positions|position_table_\d+|kv_\d+|block_table|seq_lens|query_start_loc|slot_mapping|hidden|x"
)
# What Relax's operators, and ours, raise of operands and attributes that do not fit.
UNFIT = (UnsupportedError, RuntimeError, ValueError, TypeError, LookupError)


@dataclass(frozen=True)
class Names:
    """What a graph calls the inputs and the output that are known by their names."""

    input_ids: str = "input_ids"
    position_ids: str = "position_ids"
    logits: str = "logits"


@dataclass(frozen=True)
class ImportedGraph:
    """A graph in Relax.

    Attributes:
        module: `main(input_ids, positions, weights...) -> logits [1, T, V]`.
        weights: what each weight parameter is, by its name in Relax.
        tables: position tables by the name of their parameter in Relax.
        max_positions: that the tables have rows for.
        shapes: what the graph says of fields of config.json.
    """

    module: tvm.IRModule
    weights: dict[str, Weight]
    tables: dict[str, torch.Tensor]
    max_positions: int
    shapes: dict[str, int]


def import_graph(graph: OnnxGraph, names: Names, dtype: str, max_positions: int) -> ImportedGraph:
    """Convert a graph, to be computed in `dtype`, for positions below `max_positions` at most.

    Raises:
        UnsupportedError: a node that cannot be converted; it is named.
        ModelError: the graph is not what its nodes need.
    """
    if names.logits not in graph.outputs:
        raise UnsupportedError(f"{graph.file}: no output named {names.logits}: {', '.join(graph.outputs)}")
    if names.input_ids not in graph.inputs:
        raise UnsupportedError(f"{graph.file}: no input named {names.input_ids}: {', '.join(graph.inputs)}")
    caches = {name for node in graph.nodes for name in angles_of(node) if name in graph.initializers}
    rows = (graph.initializers.shape(name)[0] for name in caches)
    return Importer(graph, names, dtype, min([max_positions, *rows])).run()


@dataclass
class Importer:
    """What converters see: `(node, importer) -> value`, a tuple of values where the node has several outputs.

    Attributes:
        dtype: what the graph's own dtype becomes.
        layers: attentions that were converted.
    """

    graph: OnnxGraph
    names: Names
    dtype: str
    max_positions: int
    builder: relax.BlockBuilder = field(default_factory=relax.BlockBuilder)
    values: dict[str, Any] = field(default_factory=dict)
    layers: int = 0
    shapes: dict[str, int] = field(default_factory=dict)
    parameters: dict[Weight, relax.Var] = field(default_factory=dict)
    tables: dict[tuple[str, bool], tuple[relax.Var, torch.Tensor]] = field(default_factory=dict)
    rows: dict[tuple[str, bool], relax.Expr] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens = tirx.Var(Sym.TOKENS, "int64")
        self.tokens = tokens
        self.input_ids = relax.Var("input_ids", relax.TensorType([tokens], "int32"))
        self.positions = relax.Var("positions", relax.TensorType([tokens], "int64"))
        self.native = native_dtype(self.graph)

    def run(self) -> ImportedGraph:
        nodes = self.graph.needed([self.names.logits], lambda n: past_of(n).operands if n.op in ATTENTION else n.inputs)
        check_operators(self.graph, nodes, CONVERTERS.keys())
        try:
            logits = self._emit_main(nodes)
        except Exception:
            self.builder._end_block()  # the one left open, of which TVM would warn beside the error
            raise
        try:
            module = mark_layers(clean(self.builder.finalize()))
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.graph.file}: {error}") from error
        self.shapes |= {"num_hidden_layers": self.layers, "vocab_size": int(logits.ty.shape.values[-1])}
        named = {var.name: weight for weight, var in self.parameters.items()}
        tensors = {var.name: tensor for var, tensor in self.tables.values()}
        return ImportedGraph(module, named, tensors, self.max_positions, self.shapes)

    def _emit_main(self, nodes: list[Node]) -> relax.Var:
        """The function itself; what it returns."""
        with self.builder.function("main"):
            with self.builder.dataflow():
                for number, node in enumerate(nodes):
                    self._convert(node, place(nodes, number))
                logits = self.builder.emit_output(self.operand(self._logits()))
            weights = list(self.parameters.values())
            tables = [var for var, _ in self.tables.values()]
            self.builder.emit_func_output(logits, params=[self.input_ids, self.positions, *weights, *tables])
        return logits

    def emit(self, expr: relax.Expr) -> relax.Var:
        return self.builder.emit(expr)

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

    def _logits(self) -> str:
        """The logits before a last cast: an engine casts them as it likes."""
        node = self.graph.producers.get(self.names.logits)
        return node.inputs[0] if node is not None and node.op == CAST else self.names.logits

    def _convert(self, node: Node, where: str) -> None:
        try:
            made = CONVERTERS[node.op](node, self)
        except UNFIT as error:
            reason = " ".join(str(error).split())
            raise UnsupportedError(f"{self.graph.file}: {node} ({where}) cannot be converted: {reason}") from error
        self.values |= zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False)
