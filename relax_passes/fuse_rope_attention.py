"""Rotation, cache write and attention: one operator, for targets that have a kernel for it."""

from __future__ import annotations

import tvm
from tvm import relax

from vllm_compile.ops import PAGED_ATTENTION, QKV_ROPE_ATTENTION, QKV_ROPE_CACHE
from vllm_compile.ops.base import arguments_of, attributes_of

from .base import Definitions, Rewrite, counted_pass, rewrite_functions


@counted_pass("fuse_rope_attention")
def fuse_rope_attention(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Attention turns its queries itself: decode has one kernel between its projections, which waits for nothing else.

    Before:
        r = qkv_rope_cache(qkv, cos, sin, kv_i, slot_mapping)
        o = paged_attention(r[0], r[1], block_table, seq_lens, query_start_loc, scale=s)
    After:
        o = qkv_rope_attention(qkv, cos, sin, kv_i, slot_mapping, block_table, seq_lens, query_start_loc, scale=s)[0]
    """
    return rewrite_functions(module, _find)


def _find(function: relax.Function) -> dict[relax.Var, Rewrite]:
    d = Definitions(function)
    found: dict[relax.Var, Rewrite] = {}
    for binding in d.bindings:
        if not PAGED_ATTENTION.matches(binding.value):
            continue
        given = arguments_of(binding.value)
        items = [d.value(given.pop(name)) for name in ("q", "kv")]
        if not all(isinstance(item, relax.TupleGetItem) for item in items):
            continue
        rotated = d.value(items[0].tuple_value)
        alone = all(d.uses(item.tuple_value) == 2 and d.value(item.tuple_value).same_as(rotated) for item in items)
        if not QKV_ROPE_CACHE.matches(rotated) or [item.index for item in items] != [0, 1] or not alone:
            continue
        found[binding.var] = _fuse(binding, {**arguments_of(rotated), **given}, attributes_of(rotated))
    return found


def _fuse(binding: relax.VarBinding, inputs: dict[str, relax.Expr], sizes: dict[str, int]) -> Rewrite:
    def rewrite(emit):
        both = emit(QKV_ROPE_ATTENTION(inputs, **sizes, **attributes_of(binding.value)))
        return {binding.var: relax.TupleGetItem(both, 0)}

    return rewrite
