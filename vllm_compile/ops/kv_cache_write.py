"""Write of k and v into the paged KV cache, for models whose rotary embedding was not fused with it."""

import torch

from .base import OwnOp
from .embedding import EXACT


def reference(
    k: torch.Tensor, kv: torch.Tensor, slot_mapping: torch.Tensor, v: torch.Tensor | None = None
) -> torch.Tensor:
    """k [T, KH, D], v [T, KH, DV]; writes kv [B, KH, N, D + DV] in place and returns it; slot -1 is not written.

    Without v, the keys hold the values too, and kv is [B, KH, N, D].
    """
    rows = k if v is None else torch.cat([k, v], dim=-1)
    written = slot_mapping >= 0
    slots, block_size = slot_mapping[written], kv.shape[2]
    kv[slots // block_size, :, slots % block_size] = rows[written]
    return kv


def sample(
    generator: torch.Generator,
    dtype: torch.dtype,
    tokens: int = 7,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    value_dim: int = 32,
):
    slots = torch.randperm(3 * block_size, generator=generator)[:tokens]
    slots[tokens // 2] = -1
    inputs = {
        "k": torch.randn(tokens, num_kv_heads, head_dim, generator=generator).to(dtype),
        "v": torch.randn(tokens, num_kv_heads, value_dim, generator=generator).to(dtype),
        "kv": torch.randn(3, num_kv_heads, block_size, head_dim + value_dim, generator=generator).to(dtype),
        "slot_mapping": slots,
    }
    if not value_dim:
        del inputs["v"]
    return inputs, {}


KV_CACHE_WRITE = OwnOp(
    "kv_cache_write",
    lambda i, a: i["kv"],
    reference,
    sample,
    {"float32": EXACT, "bfloat16": EXACT},
    updates=("kv",),
)
