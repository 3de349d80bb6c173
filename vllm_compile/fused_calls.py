"""Calls of `qkv_rope_attention` as the two calls that they stand for: what kernels, analysis and compiler ask alike."""

from __future__ import annotations

from .spec import OpSpec, Sym, TensorSpec

FUSED, ATTENTION = "qkv_rope_attention", "paged_attention"


def parts(spec: OpSpec) -> tuple[OpSpec, OpSpec]:
    """A call as two: `qkv_rope_cache`, and `paged_attention` of its result."""
    attributes = dict(spec.attributes)
    sizes = tuple((name, attributes.pop(name)) for name in ("head_dim", "num_heads", "num_kv_heads"))
    names = ("qkv", "cos", "sin", "kv", "slot_mapping")
    q = TensorSpec((Sym.TOKENS, spec.attribute("num_heads"), spec.attribute("head_dim")), spec.outputs[0].dtype)
    rotation = OpSpec("qkv_rope_cache", tuple((n, spec.input(n)) for n in names), (q,), sizes)
    rest = tuple((n, spec.input(n)) for n in ("kv", "block_table", "seq_lens", "query_start_loc"))
    attention = OpSpec(ATTENTION, (("q", q), *rest), spec.outputs, tuple(sorted(attributes.items())), spec.options)
    return rotation, attention


def attention_of(spec: OpSpec) -> OpSpec | None:
    """The `paged_attention` that a call is, or has for a part; None if it reads no KV cache."""
    if spec.op == FUSED:
        return parts(spec)[1]
    return spec if spec.op == ATTENTION else None
