"""Rotary embedding, the write of k and v into the paged KV cache, and attention over it."""

import torch
from tvm import relax

from vllm_compile.spec import OpSpec, Sym, TensorSpec

from . import paged_attention, qkv_rope_cache
from .base import OwnOp, Tolerance

TOLERANCE = {
    dtype: Tolerance(known.rtol, known.atol, f"{known.reason}; rotated q and k are rounded as by themselves")
    for dtype, known in paged_attention.TOLERANCE.items()
}


def reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """Returns [T, H, D]; changes `kv` in place.

    Inputs are those of `qkv_rope_cache` and of `paged_attention`.  The slot of a request's token is where its block
    table has it, or -1; tokens that belong to no request have -1.
    """
    q = qkv_rope_cache.reference(qkv, cos, sin, kv, slot_mapping, num_heads, num_kv_heads, head_dim)
    return paged_attention.reference(q, kv, block_table, seq_lens, query_start_loc, scale, window, soft_cap)


def sample(
    generator: torch.Generator,
    dtype: torch.dtype,
    lengths: tuple[tuple[int, int], ...] = ((1, 1), (1, 37), (9, 9), (5, 30), (0, 0)),
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
):
    """`lengths` as for `paged_attention`; with three tokens or more, one of them is not cached."""
    cache, scale = paged_attention.sample(generator, dtype, lengths, num_heads, num_kv_heads, head_dim, block_size)
    tokens = cache.pop("q").shape[0]
    given, sizes = qkv_rope_cache.sample(generator, dtype, tokens, num_heads, num_kv_heads, head_dim, block_size)
    table = cache["block_table"].long()
    requests = [(r, p) for r, (queries, length) in enumerate(lengths) for p in range(length - queries, length)]
    slots = [int(table[r, p // block_size]) * block_size + p % block_size for r, p in requests]
    given["slot_mapping"] = torch.tensor(slots, dtype=torch.int64)
    if tokens > 2:
        given["slot_mapping"][tokens // 2] = -1
    return given | cache, sizes | scale


def parts(spec: OpSpec) -> tuple[OpSpec, OpSpec]:
    """A call as two: `qkv_rope_cache`, and `paged_attention` of its result."""
    attributes = dict(spec.attributes)
    sizes = tuple((name, attributes.pop(name)) for name in ("head_dim", "num_heads", "num_kv_heads"))
    names = ("qkv", "cos", "sin", "kv", "slot_mapping")
    q = TensorSpec((Sym.TOKENS, spec.attribute("num_heads"), spec.attribute("head_dim")), spec.outputs[0].dtype)
    rotation = OpSpec("qkv_rope_cache", tuple((n, spec.input(n)) for n in names), (q,), sizes)
    rest = tuple((n, spec.input(n)) for n in ("kv", "block_table", "seq_lens", "query_start_loc"))
    attention = OpSpec(
        "paged_attention", (("q", q), *rest), spec.outputs, tuple(sorted(attributes.items())), spec.options
    )
    return rotation, attention


def attention_of(spec: OpSpec) -> OpSpec | None:
    """The `paged_attention` that a call is, or has for a part; None if it reads no KV cache."""
    if spec.op == QKV_ROPE_ATTENTION.name:
        return parts(spec)[1]
    return spec if spec.op == paged_attention.PAGED_ATTENTION.name else None


def infer(i, a):
    out = relax.TensorType([*i["qkv"].shape.values[:-1], a["num_heads"], a["head_dim"]], i["qkv"].dtype)
    return relax.TupleType([out, i["kv"]])


QKV_ROPE_ATTENTION = OwnOp(
    "qkv_rope_attention", infer, reference, sample, TOLERANCE, updates=("kv",), options=("window", "soft_cap")
)
