"""Operators of ONNX but for attention, each `(node, context) -> value`.

Norms are written out as Hugging Face's models write them, so that what follows is one way for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax

from vllm_compile.errors import UnsupportedError
from vllm_compile.ops import EMBEDDING, LAYER_NORM, LINEAR
from vllm_compile.ops.base import arguments_of

from .graph import Node
from .values import Folded, GraphInput, Weight

if TYPE_CHECKING:
    from .context import Context

SKIP_EPSILON = 1e-12  # where a node of these two has none: by ONNX Runtime's schemas

Converter = Callable[[Node, "Context"], Any]


def attributes(node: Node, known: dict[str, Any]) -> dict[str, Any]:
    """A node's attributes, those left out as in `known`; UnsupportedError for one that is not there."""
    if unknown := sorted(node.attributes.keys() - known.keys()):
        raise UnsupportedError(f"attribute {', '.join(unknown)} is not supported")
    return known | dict(node.attributes)


def only_first(node: Node, first: int) -> None:
    """UnsupportedError if the node has inputs behind the first few."""
    if any(node.inputs[first:]):
        raise UnsupportedError(f"input {next(filter(None, node.inputs[first:]))} is not supported")


def rms_norm(context: Context, x: relax.Expr, weight: relax.Expr, eps: float) -> relax.Var:
    """RMSNorm over the last axis, with the roundings of Hugging Face's LlamaRMSNorm."""
    emit, dtype = context.emit, str(x.ty.dtype)
    wide = x if dtype == "float32" else emit(relax.op.astype(x, "float32"))
    mean = emit(relax.op.mean(emit(relax.op.power(wide, relax.const(2.0, "float32"))), axis=[-1], keepdims=True))
    root = emit(relax.op.rsqrt(emit(relax.op.add(mean, relax.const(eps, "float32")))))
    normed = emit(relax.op.multiply(wide, root))
    normed = normed if dtype == "float32" else emit(relax.op.astype(normed, dtype))
    return emit(relax.op.multiply(weight, normed))


def _norm_attributes(node: Node) -> float:
    given = attributes(node, {"epsilon": 1e-5, "axis": -1, "stash_type": 1})
    if given["axis"] != -1 or given["stash_type"] != 1:
        raise UnsupportedError(f"axis {given['axis']} with stash_type {given['stash_type']} is not supported")
    return float(given["epsilon"])


def _simplified_layer_norm(node: Node, context: Context) -> Any:
    eps = _norm_attributes(node)
    x, weight = context.value(node.inputs[0]), context.operand(node.inputs[1])
    if isinstance(x, Folded):
        return Folded(rms_norm(context, x.rows, weight, eps))
    return rms_norm(context, context.operand(node.inputs[0]), weight, eps)


def _skip_simplified_layer_norm(node: Node, context: Context) -> tuple[Any, ...]:
    """The norm of a sum, and the sum: outputs 0 and 3."""
    only_first(node, 4)
    eps = float(attributes(node, {"epsilon": SKIP_EPSILON})["epsilon"])
    total = _residual_sum(node, context, node.input(3))
    return rms_norm(context, total, context.operand(node.inputs[2]), eps), None, None, total


def _layer_norm(node: Node, context: Context) -> relax.Var:
    eps = _norm_attributes(node)
    x, weight, bias = (context.operand(name) if name else None for name in (*node.inputs, "")[:3])
    return context.emit(LAYER_NORM({"x": x, "weight": weight, "bias": bias}, eps=eps))


def _skip_layer_norm(node: Node, context: Context) -> tuple[Any, ...]:
    eps = float(attributes(node, {"epsilon": SKIP_EPSILON})["epsilon"])
    total = _residual_sum(node, context, node.input(4))
    inputs = {
        "x": total,
        "weight": context.operand(node.inputs[2]),
        "bias": context.operand(node.inputs[3]) if node.input(3) else None,
    }
    return context.emit(LAYER_NORM(inputs, eps=eps)), None, None, total


def _residual_sum(node: Node, context: Context, bias: str) -> relax.Var:
    residual, x = (context.operand(name) for name in node.inputs[:2])
    return add(context, residual, add(context, x, context.operand(bias)) if bias else x)


def _matmul(node: Node, context: Context) -> relax.Var:
    """ONNX has the weight as [K, N], we as [N, K]."""
    x, weight = context.operand(node.inputs[0]), context.value(node.inputs[1])
    if not isinstance(weight, Weight) or len(weight.shape) != 2:
        raise UnsupportedError("a product with what is no weight [K, N] is not supported")
    return context.emit(LINEAR({"x": x, "weight": context.parameter(weight.flip())}))


def add(context: Context, a: relax.Expr, b: relax.Expr) -> relax.Var:
    """A sum; a vector added to what a linear layer gives is its bias."""
    for x, bias in ((a, b), (b, a)):
        linear = context.builder.lookup_binding(x) if isinstance(x, relax.Var) else None
        if bias in context.parameters.values() and LINEAR.matches(linear):
            inputs = arguments_of(linear)
            if "bias" not in inputs and list(bias.ty.shape.values) == [x.ty.shape.values[-1]]:
                return context.emit(LINEAR({**inputs, "bias": bias}))
    return context.emit(relax.op.add(a, b))


def _add(node: Node, context: Context) -> relax.Var:
    a, b = context.alike(*node.inputs)
    return add(context, a, b)


def _multiply(node: Node, context: Context) -> relax.Var:
    """A product; that of x and its sigmoid is SiLU."""
    for name, other in (node.inputs, node.inputs[::-1]):
        gate = context.graph.producers.get(other)
        if gate is not None and gate.op == "Sigmoid" and gate.inputs[0] == name:
            return context.emit(relax.op.nn.silu(context.operand(name)))
    return _binary(relax.op.multiply)(node, context)


def _divide(node: Node, context: Context) -> relax.Var:
    """A quotient; one over a square root is one operation."""
    one, root = context.value(node.inputs[0]), context.graph.producers.get(node.inputs[1])
    if isinstance(one, np.ndarray) and one.size == 1 and one.item() == 1 and root is not None and root.op == "Sqrt":
        return context.emit(relax.op.rsqrt(*context.alike(root.inputs[0])))
    return _binary(relax.op.divide)(node, context)


def _reduce_mean(node: Node, context: Context) -> relax.Var:
    """Over the last axis; where float32 is narrowed, it and what follows is a norm's, and stays float32.

    The axes are an input since opset 18, before that an attribute.
    """
    given = attributes(node, {"axes": [], "keepdims": 1, "noop_with_empty_axes": 0})
    axes = context.numbers(node.inputs[1]) if node.input(1) else list(given["axes"])
    x = _squares(context, node.inputs[0]) if context.narrows else context.operand(node.inputs[0])
    if axes not in ([-1], [x.ty.ndim - 1]) or not given["keepdims"]:
        raise UnsupportedError(f"over axes {axes or 'that are left out'} is not supported")
    return context.emit(relax.op.mean(x, axis=[-1], keepdims=True))


def _squares(context: Context, name: str) -> relax.Expr:
    """The value called `name` in float32: products and powers from their operands, before they were rounded."""
    made = context.graph.producers.get(name)
    operator = None if made is None else {"Pow": relax.op.power, "Mul": relax.op.multiply}.get(made.op)
    if made is None or operator is None:
        return context.in_float32(name)
    return context.emit(operator(*map(context.in_float32, made.inputs)))


def _binary(operator: Callable[..., relax.Expr]) -> Converter:
    def convert(node: Node, context: Context) -> relax.Var:
        return context.emit(operator(*context.alike(*node.inputs)))

    return convert


def _unary(operator: Callable[..., relax.Expr]) -> Converter:
    return lambda node, context: context.emit(operator(*context.alike(node.inputs[0])))


def _gelu(node: Node, context: Context) -> relax.Var:
    form = attributes(node, {"approximate": "none"})["approximate"]
    operator = relax.op.nn.gelu_tanh if form == "tanh" else relax.op.nn.gelu
    return context.emit(operator(context.operand(node.inputs[0])))


def _identity(node: Node, context: Context) -> Any:
    (name,) = node.inputs
    return context.wide[name] if name in context.wide else context.value(name)


def _cast(node: Node, context: Context) -> relax.Expr:
    dtype = context.float_dtype(node.attributes["to"])
    if context.narrows:  # from float32 to float32
        return _identity(node, context)
    x = context.operand(node.inputs[0])
    return x if str(x.ty.dtype) == dtype else context.emit(relax.op.astype(x, dtype))


def _gather(node: Node, context: Context) -> relax.Var:
    """The embedding; token ids are taken as they come."""
    table, ids = (context.value(name) for name in node.inputs)
    if attributes(node, {"axis": 0})["axis"] != 0 or not isinstance(table, Weight):
        raise UnsupportedError("only rows of a weight can be gathered")
    if ids != GraphInput(context.names.input_ids):
        raise UnsupportedError(f"only rows for {context.names.input_ids} can be gathered, not for {node.inputs[1]}")
    context.shapes["hidden_size"] = table.shape[1]
    ids_1T = context.emit(relax.op.expand_dims(context.input_ids, 0))
    return context.emit(EMBEDDING({"ids": ids_1T, "table": context.parameter(table)}))


CONVERTERS: dict[str, Converter] = {
    "Add": _add,
    "Cast": _cast,
    "Div": _divide,
    "Exp": _unary(relax.op.exp),
    "Gather": _gather,
    "Gelu": _gelu,
    "Identity": _identity,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Mul": _multiply,
    "Neg": _unary(relax.op.negative),
    "Pow": _binary(relax.op.power),
    "ReduceMean": _reduce_mean,
    "Relu": _unary(relax.op.nn.relu),
    "Sigmoid": _unary(relax.op.sigmoid),
    "SimplifiedLayerNormalization": _simplified_layer_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "SkipSimplifiedLayerNormalization": _skip_simplified_layer_norm,
    "Sqrt": _unary(relax.op.sqrt),
    "Sub": _binary(relax.op.subtract),
    "Tanh": _unary(relax.op.tanh),
}
