"""Operators of ONNX that change shapes alone, each `(node, context) -> value`.

Axes 0 and 1 are ONNX's batch and sequence, which here are one flat batch of tokens: nothing cuts or moves them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax

from vllm_compile.errors import UnsupportedError

from .graph import Node
from .operators import Converter, attributes
from .values import Folded, Weight

if TYPE_CHECKING:
    from .context import Context


def _transpose(node: Node, context: Context) -> Any:
    x = context.value(node.inputs[0])
    axes = list(node.attributes.get("perm", []))
    if isinstance(x, Weight) and axes in ([1, 0], []) and len(x.shape) == 2:
        return x.flip()
    if axes[:2] != [0, 1]:
        raise UnsupportedError(
            f"a transposition by {axes or 'nothing'} is not supported: tokens are batched as they come"
        )
    return context.emit(relax.op.permute_dims(context.operand(node.inputs[0]), axes))


def _reshape(node: Node, context: Context) -> Any:
    """Of the last axis, in two or back into one; heads may be counted with the tokens in between."""
    x, shape = context.value(node.inputs[0]), context.numbers(node.inputs[1])
    if attributes(node, {"allowzero": 0})["allowzero"]:
        raise UnsupportedError("allowzero is not supported")
    rows = x.rows if isinstance(x, Folded) else context.operand(node.inputs[0])
    width = int(np.prod([int(dim) for dim in rows.ty.shape.values[2:]]))
    keeps_tokens = len(shape) >= 2 and shape[0] in (0, 1, -1) and shape[1] in (0, -1)
    inner = shape[2:]
    if not keeps_tokens or not inner or any(dim == 0 for dim in inner) or inner.count(-1) > 1:
        raise UnsupportedError(f"to {shape} is not supported")
    if -1 in inner:
        inner[inner.index(-1)] = width // int(-np.prod(inner))
    folds = len(inner) == 1 and inner[0] != width and width % inner[0] == 0
    inner = [width // inner[0], *inner] if folds else inner
    if int(np.prod(inner)) != width:
        raise UnsupportedError(f"of {width} values for each token to {shape} is not supported")
    reshaped = context.emit(relax.op.reshape(rows, [1, context.tokens, *inner]))
    return Folded(reshaped) if folds else reshaped


def _split(node: Node, context: Context) -> tuple[relax.Expr, ...]:
    x = context.operand(node.inputs[0])
    given = attributes(node, {"axis": 0, "num_outputs": len(node.outputs)})
    axis = _inner_axis(x, given["axis"])
    width = int(x.ty.shape.values[axis])
    even = [-(-width // len(node.outputs))] * (len(node.outputs) - 1)  # the last part is smaller where it must be
    sizes = context.numbers(node.inputs[1]) if node.input(1) else [*even, width - sum(even)]
    starts = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    parts = context.emit(relax.op.split(x, starts, axis=axis - x.ty.ndim))
    return tuple(context.emit(relax.TupleGetItem(parts, i)) for i in range(len(sizes)))


def _concat(node: Node, context: Context) -> relax.Var:
    parts = [context.operand(name) for name in node.inputs]
    return context.emit(relax.op.concat(parts, axis=_inner_axis(parts[0], node.attributes["axis"]) - parts[0].ty.ndim))


def _slice(node: Node, context: Context) -> relax.Var:
    x = context.operand(node.inputs[0])
    starts, ends = (context.numbers(name) for name in node.inputs[1:3])
    axes = context.numbers(node.inputs[3]) if node.input(3) else list(range(len(starts)))
    steps = context.numbers(node.inputs[4]) if node.input(4) else [1] * len(starts)
    axes = [_inner_axis(x, axis) for axis in axes]
    if min(steps) < 1:
        raise UnsupportedError(f"in steps of {steps} is not supported")
    return context.emit(relax.op.strided_slice(x, axes, starts, ends, steps))


def _inner_axis(x: relax.Expr, axis: int) -> int:
    """An axis counted from the first; UnsupportedError unless it is one behind the tokens'."""
    counted = axis % x.ty.ndim
    if counted < 2:
        raise UnsupportedError(f"along axis {axis} is not supported: tokens are batched as they come")
    return counted


CONVERTERS: dict[str, Converter] = {
    "Concat": _concat,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
