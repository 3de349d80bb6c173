"""Rotary embedding of q and k, and the write of k and v into the KV cache: one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from vllm_compile.ops import KV_CACHE_WRITE, PAGED_ATTENTION, QKV_ROPE_CACHE
from vllm_compile.ops.base import arguments_of, attributes_of

from .base import Definitions, Rewrite, counted_pass, rewrite_functions

ROWS_TO_HEADS = [0, 2, 1, 3]  # swaps the axes of tokens and heads, both ways


@dataclass(frozen=True)
class _Rotated:
    """One rotated projection: where it came from and what turned it."""

    source: Any  # [1, T, heads, D]
    cos: relax.Expr
    sin: relax.Expr


@counted_pass("fuse_rope_cache")
def fuse_rope_cache(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Rotate and store while the merged projection is still in cache.

    Before:
        q, k, v = split(qkv, axis=-1), each reshaped to [1, T, heads, D]
        rotate(t) = add(multiply(t, cos), multiply(concat([negative(t[D/2:]), t[:D/2]]), sin))
        kv = kv_cache_write(rotate(k), v, kv_i, slot_mapping)
        o = paged_attention(rotate(q), kv, ...)
    After:
        r = qkv_rope_cache(qkv, cos, sin, kv_i, slot_mapping)
        o = paged_attention(r[0], r[1], ...)
    """
    return rewrite_functions(module, _find)


def _find(function: relax.Function) -> dict[relax.Var, Rewrite]:
    d = Definitions(function)
    found: dict[relax.Var, Rewrite] = {}
    for binding in d.bindings:
        if not PAGED_ATTENTION.matches(binding.value):
            continue
        attention = arguments_of(binding.value)
        write = d.value(attention["kv"])
        if not KV_CACHE_WRITE.matches(write):
            continue
        cache = arguments_of(write)
        q, k = _match_rotation(d, attention["q"]), _match_rotation(d, cache["k"])
        if q is None or k is None or not (q.cos.same_as(k.cos) and q.sin.same_as(k.sin)):
            continue
        parts = [_match_part(d, source) for source in (q.source, k.source, _rows(d, cache["v"]))]
        if [index for _, index in parts] != [0, 1, 2] or not all(p.same_as(parts[0][0]) for p, _ in parts):
            continue
        if int(cache["kv"].ty.shape.values[3]) != 2 * int(attention["q"].ty.shape.values[-1]):
            continue  # values of another width than keys
        inputs = {
            "qkv": parts[0][0],
            "cos": q.cos,
            "sin": q.sin,
            "kv": cache["kv"],
            "slot_mapping": cache["slot_mapping"],
        }
        found[binding.var] = _fuse(binding, attention, inputs)
    return found


def _fuse(binding: relax.VarBinding, attention: dict[str, relax.Expr], inputs: dict[str, relax.Expr]) -> Rewrite:
    _, _, num_heads, head_dim = attention["q"].ty.shape.values
    num_kv_heads = inputs["kv"].ty.shape.values[1]

    def rewrite(emit):
        rotated = emit(
            QKV_ROPE_CACHE(inputs, num_heads=int(num_heads), num_kv_heads=int(num_kv_heads), head_dim=int(head_dim))
        )
        q, kv = emit(relax.TupleGetItem(rotated, 0)), emit(relax.TupleGetItem(rotated, 1))
        given = {**attention, "q": q, "kv": kv}
        return {binding.var: PAGED_ATTENTION(given, **attributes_of(binding.value))}

    return rewrite


def _rows(d: Definitions, expr: Any) -> Any:
    """Undo a pair of permutations between [1, T, heads, D] and [1, heads, T, D]."""
    outer = d.call(expr, "relax.permute_dims")
    inner = d.call(d.operand(outer, "relax.permute_dims"), "relax.permute_dims")
    swaps = [[int(a) for a in p.attrs.axes] for p in (outer, inner) if p is not None]
    return inner.args[0] if swaps == [ROWS_TO_HEADS, ROWS_TO_HEADS] else expr


def _match_rotation(d: Definitions, expr: Any) -> _Rotated | None:
    """permute(rotate(permute(source))) with the rotation of half-split RoPE."""
    total = d.call(d.operand(expr, "relax.permute_dims"), "relax.add")
    if total is None:
        return None
    straight, crossed = (d.call(arg, "relax.multiply") for arg in total.args)
    if straight is None or crossed is None:
        return None
    heads, cos = straight.args
    pair = d.value(d.operand(crossed.args[0], "relax.concat"))
    parts = list(pair.fields) if isinstance(pair, relax.Tuple) else []
    negated = d.call(parts[0], "relax.negative") if len(parts) == 2 else None
    if negated is None:
        return None
    middle = int(heads.ty.shape.values[-1]) // 2
    halves = [_last_axis_start(d, part, heads) for part in (negated.args[0], parts[1])]
    forward = d.call(heads, "relax.permute_dims")
    if halves != [middle, 0] or forward is None or [int(a) for a in forward.attrs.axes] != ROWS_TO_HEADS:
        return None
    return _Rotated(forward.args[0], cos, crossed.args[1])


def _last_axis_start(d: Definitions, expr: Any, of: relax.Expr) -> int | None:
    """Where a slice of half the last axis of `of` starts, or None if `expr` is no such slice."""
    cut = d.call(expr, "relax.strided_slice")
    if cut is None or not cut.args[0].same_as(of):
        return None
    axes, begin, _, strides = ([int(v.value if hasattr(v, "value") else v) for v in arg] for arg in cut.args[1:5])
    width = int(of.ty.shape.values[-1])
    whole = 2 * int(expr.ty.shape.values[-1]) == width
    return begin[0] if axes == [len(of.ty.shape.values) - 1] and strides == [1] and whole else None


def _match_part(d: Definitions, expr: Any) -> tuple[Any, int]:
    """(qkv, i) if `expr` is part i of a split of qkv, reshaped; else (None, -1)."""
    item = d.value(d.operand(expr, "relax.reshape"))
    split = d.call(item.tuple_value, "relax.split") if isinstance(item, relax.TupleGetItem) else None
    return (split.args[0], int(item.index)) if split is not None else (None, -1)
