"""Rotary embedding, the write of k and v into the paged KV cache, and attention over it."""

import torch
from tvm import relax

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


def infer(i, a):
    out = relax.TensorType([*i["qkv"].shape.values[:-1], a["num_heads"], a["head_dim"]], i["qkv"].dtype)
    return relax.TupleType([out, i["kv"]])


QKV_ROPE_ATTENTION = OwnOp(
    "qkv_rope_attention", infer, reference, sample, TOLERANCE, updates=("kv",), options=("window", "soft_cap")
)
