"""Attention and rotary embedding as ONNX Runtime's operators state them (domain com.microsoft)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from tvm import relax

from vllm_compile.errors import UnsupportedError
from vllm_compile.ops import CAUSAL_ATTENTION

from .graph import Node
from .operators import attributes, only_first, rms_norm
from .values import GraphInput, Heads

if TYPE_CHECKING:
    from .context import Context

ROWS_TO_HEADS = [0, 2, 1, 3]  # swaps the axes of tokens and heads, both ways
ATTENTION = ("GroupQueryAttention",)
# Attributes of GroupQueryAttention that we read, as they are where a node leaves them out.
GIVEN = {
    "num_heads": 0,
    "kv_num_heads": 0,
    "scale": 0.0,
    "local_window_size": -1,
    "softcap": 0.0,
    "do_rotary": 0,
    "rotary_interleaved": 0,
    "qk_norm_epsilon": 1e-6,
    "sliding_window_cache": 0,  # how past keys are kept: ours are paged
}
# Those that ask for what we do not do, with the values that do not.
OFF: dict[str, tuple[Any, ...]] = {
    "smooth_softmax": (0, -1),
    "qk_output": (0,),
    "kv_cache_bit_width": (0,),
    "k_quant_type": ("NONE",),
    "v_quant_type": ("NONE",),
}


@dataclass(frozen=True)
class Past:
    """The inputs of an attention: operands, and what tells where its sequences end, which an engine does."""

    operands: tuple[str, ...]
    key: str
    value: str
    lengths: tuple[str, ...]
    cos: str
    sin: str
    norms: tuple[str, str]


def past_of(node: Node) -> Past:
    """The inputs of a GroupQueryAttention by their places."""
    qkv = tuple(filter(None, node.inputs[:3]))
    norms = (node.input(14), node.input(15))
    operands = (*qkv, *filter(None, norms))
    return Past(operands, node.input(3), node.input(4), node.inputs[5:7], node.input(7), node.input(8), norms)


def angles_of(node: Node) -> tuple[str, ...]:
    """Names of the caches of cosines and sines [P, D / 2] that a node reads by position."""
    places = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}.get(node.op, ())
    return tuple(filter(None, map(node.input, places)))


def _group_query_attention(node: Node, context: Context) -> tuple[relax.Expr]:
    given = attributes(node, GIVEN | {name: values[0] for name, values in OFF.items()})
    for name, values in OFF.items():
        if given[name] not in values:
            raise UnsupportedError(f"{name} {given[name]} is not supported")
    past = past_of(node)
    _check_inputs(node, past, context)
    heads, kv_heads = int(given["num_heads"]), int(given["kv_num_heads"])
    q, k, v, head_dim = _heads(node, context, past, (heads, kv_heads), float(given["qk_norm_epsilon"]))
    shapes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    if before := {
        name: context.shapes[name] for name in shapes if context.shapes.get(name, shapes[name]) != shapes[name]
    }:
        raise UnsupportedError(f"heads unlike those of the layers before: {shapes}, where they have {before}")
    context.shapes |= shapes
    if given["do_rotary"]:
        interleaved = bool(given["rotary_interleaved"])
        q, k = (rotate(context, x, past.cos, past.sin, interleaved) for x in (q, k))
    window = max(int(given["local_window_size"]), 0)
    options = {
        "layer": context.layers,
        "scale": _scale(float(given["scale"]), head_dim),
        "window": 0 if window >= context.max_positions else window,
        "soft_cap": float(given["softcap"]),
    }
    context.layers += 1
    rows = context.emit(CAUSAL_ATTENTION({"q": q, "k": k, "v": v}, **options))
    return (context.emit(relax.op.reshape(rows, [1, context.tokens, heads * head_dim])),)


def _check_inputs(node: Node, past: Past, context: Context) -> None:
    """Past keys and values are this layer's own; lengths come from the mask; nothing else is given."""
    graph = context.graph
    if past.key not in graph.inputs or past.value not in graph.inputs:
        raise UnsupportedError(
            f"keys {past.key or 'left out'} and values {past.value or 'left out'} that are no "
            "inputs of the graph are not supported"
        )
    if sharing := [str(n) for n in graph.nodes if n is not node and {past.key, past.value} & {*n.inputs}]:
        raise UnsupportedError(f"a KV cache shared with {', '.join(sharing)} is not supported")
    if past.key == past.value:
        raise UnsupportedError(f"keys and values that are both {past.key} are not supported")
    known = {past.key, past.value} | {n for n in graph.inputs if graph.inputs[n] in (6, 7)}
    if other := {source for name in past.lengths for source in graph.sources(name)} - known:
        raise UnsupportedError(f"lengths that depend on {', '.join(sorted(other))} are not supported")
    for index, what in ((10, "attention_bias"), (11, "head_sink"), (12, "k_scale"), (13, "v_scale")):
        if node.input(index):
            raise UnsupportedError(f"{what} is not supported")
    only_first(node, 16)
    if node.input(9) not in ("", context.names.position_ids):
        raise UnsupportedError(f"positions {node.input(9)} are not supported")


def _heads(
    node: Node, context: Context, past: Past, counts: tuple[int, int], eps: float
) -> tuple[relax.Expr, relax.Expr, relax.Expr, int]:
    """q, k and v as [1, heads, T, D], normalised where the node has weights for it, and D."""
    heads, kv_heads = counts
    if node.input(1):
        parts = [context.value(name) for name in node.inputs[:3]]
        width = int(context.operand(node.inputs[2]).ty.shape.values[-1]) // kv_heads
    else:
        packed = context.operand(node.inputs[0])
        width = int(packed.ty.shape.values[-1]) // (heads + 2 * kv_heads)
        split = context.emit(relax.op.split(packed, [heads * width, (heads + kv_heads) * width], axis=-1))
        parts = [context.emit(relax.TupleGetItem(split, i)) for i in range(3)]
    named = zip(parts, (heads, kv_heads, kv_heads), (*past.norms, ""), strict=True)
    q, k, v = (_by_head(context, part, count, width, norm, eps) for part, count, norm in named)
    return q, k, v, width


def _by_head(context: Context, part: Any, count: int, width: int, norm: str, eps: float) -> relax.Expr:
    if isinstance(part, Heads) and not norm:
        return part.heads
    if not isinstance(part, relax.Expr):
        raise UnsupportedError(f"an operand that is no activation [1, T, {count} * {width}] is not supported")
    if (given := int(part.ty.shape.values[-1])) != count * width:
        raise UnsupportedError(f"{given} values for each token are not {count} heads of {width}")
    rows = context.emit(relax.op.reshape(part, [1, context.tokens, count, width]))
    rows = rms_norm(context, rows, context.operand(norm), eps) if norm else rows
    return context.emit(relax.op.permute_dims(rows, ROWS_TO_HEADS))


def _scale(given: float, head_dim: int) -> float:
    """ONNX keeps it in 32 bits; one over the root of the width is meant exactly, and is what is left out."""
    usual = head_dim**-0.5
    return usual if given in (0.0, float(np.float32(usual))) else given


def rotate(context: Context, x: relax.Expr, cos: str, sin: str, interleaved: bool) -> relax.Expr:
    """The first columns of x [1, H, T, D] rotated, as many as the caches have angles for; halves, or pairs."""
    emit = context.emit
    cos_rows, sin_rows = context.table_rows(cos, interleaved), context.table_rows(sin, interleaved)
    head_dim, width = int(x.ty.shape.values[-1]), int(cos_rows.ty.shape.values[-1])
    turned = x if width == head_dim else emit(relax.op.strided_slice(x, [3], [0], [width], [1]))
    straight = emit(relax.op.multiply(turned, cos_rows))
    crossed = emit(relax.op.multiply(_quarter_turn(context, turned, interleaved), sin_rows))
    rotated = emit(relax.op.add(straight, crossed))
    if width == head_dim:
        return rotated
    rest = emit(relax.op.strided_slice(x, [3], [width], [head_dim], [1]))
    return emit(relax.op.concat([rotated, rest], axis=-1))


def _quarter_turn(context: Context, x: relax.Expr, interleaved: bool) -> relax.Expr:
    """(-second, first) of the halves of the last axis, or of each pair of neighbours."""
    emit, width = context.emit, int(x.ty.shape.values[-1])
    if not interleaved:
        first = emit(relax.op.strided_slice(x, [3], [0], [width // 2], [1]))
        second = emit(relax.op.strided_slice(x, [3], [width // 2], [width], [1]))
        return emit(relax.op.concat([emit(relax.op.negative(second)), first], axis=-1))
    first = emit(relax.op.strided_slice(x, [3], [0], [width], [2]))
    second = emit(relax.op.strided_slice(x, [3], [1], [width], [2]))
    pairs = [emit(relax.op.expand_dims(half, -1)) for half in (emit(relax.op.negative(second)), first)]
    return emit(relax.op.reshape(emit(relax.op.concat(pairs, axis=-1)), x.ty.shape))


def _rotary_embedding(node: Node, context: Context) -> Heads:
    """The rotation as an operator of its own, of [1, T, heads * D]."""
    known = {"interleaved": 0, "num_heads": 0, "rotary_embedding_dim": 0, "is_packed_batching": 0, "scale": 1.0}
    given = attributes(node, known)
    if given["is_packed_batching"] or given["scale"] != 1.0:
        raise UnsupportedError("is_packed_batching, or a scale, is not supported")
    x, positions = context.operand(node.inputs[0]), context.value(node.inputs[1])
    if positions != GraphInput(context.names.position_ids):
        raise UnsupportedError(f"positions {node.inputs[1]} are not supported")
    if x.ty.ndim != 3:
        raise UnsupportedError("heads that are an axis of their own are not supported")
    cos, sin = node.inputs[2:4]
    interleaved = bool(given["interleaved"])
    angles = int(context.table_rows(cos, interleaved).ty.shape.values[-1])
    width = int(x.ty.shape.values[-1])
    count = int(given["num_heads"]) or width // angles
    return Heads(rotate(context, _by_head(context, x, count, width // count, "", 0.0), cos, sin, interleaved))


CONVERTERS = {"GroupQueryAttention": _group_query_attention, "RotaryEmbedding": _rotary_embedding}
