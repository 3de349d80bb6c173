"""Operators of torch to Relax where TVM's importer gets them wrong, or where they should stay whole.

Each converter is `(node, importer) -> Relax value`; what stays whole becomes an operator of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import fx
from tvm import relax

from vllm_compile.errors import UnsupportedError
from vllm_compile.ops import CAUSAL_ATTENTION, EMBEDDING, LAYER_BOUNDARY, LAYER_NORM, LIMIT_GROUPS, LINEAR, MOE
from vllm_compile.relax_passes.base import same_type


class Importing(Protocol):
    """What converters see of TVM's importer, and of ours.

    Attributes:
        env: what each node was converted to.
        tables: parameters that hold position tables.
        max_positions: of a sequence.
    """

    env: dict[Any, Any]
    block_builder: relax.BlockBuilder
    tables: list[relax.Var]
    max_positions: int

    def retrieve_args(self, node: fx.Node) -> Any: ...

    def _emit_torch_reshape(self, x: relax.Expr, shape: Any) -> relax.Var: ...


def _select(node: fx.Node, importer: Importing) -> relax.Var:
    """One index of an axis, as a slice without the axis."""
    x, axis, index = importer.env[node.args[0]], cast(int, node.args[1]), node.args[2]
    if not isinstance(index, int):
        raise UnsupportedError("its index depends on the number of tokens")
    shape = x.ty.shape.values
    axis %= len(shape)
    if index < 0:
        index += int(shape[axis])
    part = importer.block_builder.emit(relax.op.strided_slice(x, [axis], [index], [index + 1], [1]))
    return importer.block_builder.emit(relax.op.squeeze(part, [axis]))


def _reshape(node: fx.Node, importer: Importing) -> relax.Var:
    """TVM's own fails on a shape that has the same axes as its operand's, tokens among them, in another order."""
    x, shape = importer.retrieve_args(node)
    reshaped = importer._emit_torch_reshape(x, shape)
    return x if same_type(reshaped, x) else reshaped


def _linear(node: fx.Node, importer: Importing) -> relax.Var:
    x, weight, *bias = importer.retrieve_args(node)
    inputs = {"x": x, "weight": weight, "bias": bias[0] if bias else None}
    return importer.block_builder.emit(LINEAR(inputs))


def _addmm(node: fx.Node, importer: Importing) -> relax.Var:
    """GPT-2 keeps its weights transposed."""
    bias, x, weight = importer.retrieve_args(node)[:3]
    transposed = importer.block_builder.emit(relax.op.permute_dims(weight, [1, 0]))
    return importer.block_builder.emit(LINEAR({"x": x, "weight": transposed, "bias": bias}))


def _transpose(node: fx.Node, importer: Importing) -> relax.Var:
    x = importer.env[node.args[0]]
    return importer.block_builder.emit(relax.op.permute_dims(x, list(range(x.ty.ndim))[::-1]))


def _matmul(node: fx.Node, importer: Importing) -> relax.Var:
    """A product with a weight [K, N] (Falcon writes its transpose out) is a linear layer."""
    x, weight = importer.retrieve_args(node)
    if len(weight.ty.shape.values) != 2 or weight.ty.shape.values[0] != x.ty.shape.values[-1]:
        raise UnsupportedError(f"operator matmul of {x.ty} and {weight.ty} is not supported")
    transposed = importer.block_builder.emit(relax.op.permute_dims(weight, [1, 0]))
    return importer.block_builder.emit(LINEAR({"x": x, "weight": transposed}))


def _layer_norm(node: fx.Node, importer: Importing) -> relax.Var:
    args = importer.retrieve_args(node)
    x, shape, weight, bias, eps = (*args, *(None, None, 1e-5)[len(args) - 2 :])[:5]
    if len(shape) != 1:
        raise UnsupportedError(f"layer_norm over {list(shape)} is not supported")
    return importer.block_builder.emit(LAYER_NORM({"x": x, "weight": weight, "bias": bias}, eps=float(eps)))


def _embedding(node: fx.Node, importer: Importing) -> relax.Var:
    table, ids = importer.retrieve_args(node)[:2]
    if ids in importer.tables:  # a function of the position looked up in a weight: that depends on weights alone
        rows = importer.block_builder.emit(EMBEDDING({"ids": ids, "table": table}))
        (lookup,) = node.args[1:2]
        return _rows_of_positions(importer, cast(fx.Node, lookup).args[0], rows)
    return importer.block_builder.emit(EMBEDDING({"ids": ids, "table": table}))


def _cast(node: fx.Node, importer: Importing) -> relax.Expr:
    """A cast to the dtype a value already has (float32 models are full of them) is nothing."""
    x = importer.env[node.args[0]]
    dtype = str(node.args[1]).removeprefix("torch.")
    return x if str(x.ty.dtype) == dtype else importer.block_builder.emit(relax.op.astype(x, dtype))


def _softmax(node: fx.Node, importer: Importing) -> relax.Var:
    """In the dtype that is asked for: the values are cast before."""
    x, axis, *dtype = node.args
    values = importer.env[x]
    wanted = dtype[0] if dtype else node.kwargs.get("dtype")
    name = str(values.ty.dtype) if wanted is None else str(wanted).removeprefix("torch.")
    if str(values.ty.dtype) != name:
        values = importer.block_builder.emit(relax.op.astype(values, name))
    return importer.block_builder.emit(relax.op.nn.softmax(values, cast(int, axis)))


def _topk(node: fx.Node, importer: Importing) -> relax.Var:
    """In falling order, which is one of those that a caller who wants none gets."""
    x, k, axis, largest = (*importer.retrieve_args(node), -1, True)[:4]
    return importer.block_builder.emit(relax.op.topk(x, k, axis, "both", largest, "int64"))


def _causal_attention(node: fx.Node, importer: Importing) -> relax.Var:
    q, k, v, layer, scale, window, soft_cap = importer.retrieve_args(node)
    if window >= importer.max_positions:  # a window as long as the model sees everything
        window = 0
    attributes = {"layer": layer, "scale": scale, "window": window, "soft_cap": soft_cap}
    return importer.block_builder.emit(CAUSAL_ATTENTION({"q": q, "k": k, "v": v}, **attributes))


def _layer_boundary(node: fx.Node, importer: Importing) -> relax.Var:
    x, index = importer.retrieve_args(node)
    return importer.block_builder.emit(LAYER_BOUNDARY({"x": x}, index=index))


def _limit_groups(node: fx.Node, importer: Importing) -> relax.Var:
    scores, groups, kept, best, zeros = importer.retrieve_args(node)
    attributes = {"groups": groups, "kept": kept, "best": best, "zeros": int(zeros)}
    return importer.block_builder.emit(LIMIT_GROUPS({"scores": scores}, **attributes))


def _moe(node: fx.Node, importer: Importing) -> relax.Var:
    x, experts, scores, gate_up, down = importer.retrieve_args(node)
    inputs = {"x": x, "experts": experts, "scores": scores, "gate_up": gate_up, "down": down}
    return importer.block_builder.emit(MOE(inputs))


def _divide_in_place(node: fx.Node, importer: Importing) -> relax.Var:
    """Whoever reads the value that was divided reads the result from here on."""
    a, b = importer.retrieve_args(node)
    importer.env[node.args[0]] = quotient = importer.block_builder.emit(relax.op.divide(a, b))
    return quotient


def _position_table(node: fx.Node, importer: Importing) -> relax.Var:
    """The rows of a table; a table of whole numbers stands for its values at the positions."""
    positions, index = node.args[:2]
    table = importer.tables[cast(int, index)]
    return table if len(table.ty.shape.values) == 1 else _rows_of_positions(importer, positions, table)


def _rows_of_positions(importer: Importing, positions: Any, table: relax.Var) -> relax.Var:
    rows = importer.block_builder.emit(EMBEDDING({"ids": importer.env[positions], "table": table}))
    return importer.block_builder.emit(relax.op.expand_dims(rows, 0))


CONVERTERS: dict[str, Callable[[fx.Node, Importing], Any]] = {
    "linear.default": _linear,
    "addmm.default": _addmm,
    "matmul.default": _matmul,
    "numpy_T.default": _transpose,
    "layer_norm.default": _layer_norm,
    "dropout.default": lambda node, importer: importer.env[node.args[0]],
    "embedding.default": _embedding,
    "causal_attention.default": _causal_attention,
    "layer_boundary.default": _layer_boundary,
    "limit_groups.default": _limit_groups,
    "moe.default": _moe,
    "view.default": _reshape,
    "reshape.default": _reshape,
    "select.int": _select,
    "div_.Tensor": _divide_in_place,
    "to.dtype": _cast,
    "softmax.int": _softmax,
    "topk.default": _topk,
    "position_table.default": _position_table,
}
