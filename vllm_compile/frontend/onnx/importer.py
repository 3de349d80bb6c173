"""An ONNX graph to Relax: the same operators, written in the same way, as a model of Hugging Face is imported to.

ONNX's batch and sequence are the one flat batch that a serving engine calls: [1, T, ...].  What a graph does with
its mask and its past keys and values, to know where each sequence ends, is left to the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tvm
from tvm import relax

from vllm_compile.errors import UnsupportedError
from vllm_compile.relax_passes.base import clean

from .attention import ATTENTION, angles_of, past_of
from .attention import CONVERTERS as ATTENTION_OPERATORS
from .context import Context, Names
from .graph import Node, OnnxGraph
from .layers import mark_layers
from .operators import CONVERTERS as PLAIN_OPERATORS
from .refusals import check_operators, native_dtype, place
from .shapes import CONVERTERS as SHAPE_OPERATORS
from .values import Weight

CONVERTERS = {**PLAIN_OPERATORS, **SHAPE_OPERATORS, **ATTENTION_OPERATORS}
CAST = "Cast"
# What Relax's operators, and ours, raise of operands and attributes that do not fit.
UNFIT = (UnsupportedError, RuntimeError, ValueError, TypeError, LookupError)


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
    context = Context(graph, names, native_dtype(graph), dtype, min([max_positions, *rows]))
    nodes = graph.needed([names.logits], lambda n: past_of(n).operands if n.op in ATTENTION else n.inputs)
    check_operators(graph, nodes, CONVERTERS.keys())
    try:
        logits = _emit_main(context, nodes)
    except Exception:
        context.builder._end_block()  # the one left open, of which TVM would warn beside the error
        raise
    try:
        module = mark_layers(clean(context.builder.finalize()))
    except UnsupportedError as error:
        raise UnsupportedError(f"{graph.file}: {error}") from error
    shapes = {**context.shapes, "num_hidden_layers": context.layers, "vocab_size": int(logits.ty.shape.values[-1])}
    weights = {var.name: weight for weight, var in context.parameters.items()}
    tables = {var.name: tensor for var, tensor in context.tables.values()}
    return ImportedGraph(module, weights, tables, context.max_positions, shapes)


def _emit_main(context: Context, nodes: list[Node]) -> relax.Var:
    """The function itself; what it returns."""
    builder = context.builder
    with builder.function("main"):
        with builder.dataflow():
            for number, node in enumerate(nodes):
                _convert(context, node, place(nodes, number))
            logits = builder.emit_output(context.operand(_logits(context)))
        weights = list(context.parameters.values())
        tables = [var for var, _ in context.tables.values()]
        builder.emit_func_output(logits, params=[context.input_ids, context.positions, *weights, *tables])
    return logits


def _logits(context: Context) -> str:
    """The logits before a last cast: an engine casts them as it likes."""
    node = context.graph.producers.get(context.names.logits)
    return node.inputs[0] if node is not None and node.op == CAST else context.names.logits


def _convert(context: Context, node: Node, where: str) -> None:
    try:
        made = CONVERTERS[node.op](node, context)
    except UNFIT as error:
        reason = " ".join(str(error).split())
        raise UnsupportedError(f"{context.graph.file}: {node} ({where}) cannot be converted: {reason}") from error
    for name, value in zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False):
        context.define(name, value)
