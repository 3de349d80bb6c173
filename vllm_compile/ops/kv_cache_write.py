"""Write of k and v into the paged KV cache, for models whose rotary embedding was not fused with it."""

import torch

from .base import OwnOp
from .embedding import EXACT


def reference(k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, slot_mapping: torch.Tensor) -> torch.Tensor:
    """k, v [T, KH, D]; writes kv [B, KH, N, 2*D] in place and returns it; slot -1 is not written."""
    written = slot_mapping >= 0
    slots, block_size = slot_mapping[written], kv.shape[2]
    kv[slots // block_size, :, slots % block_size] = torch.cat([k, v], dim=-1)[written]
    return kv


def sample(
    generator: torch.Generator,
    dtype: torch.dtype,
    tokens: int = 7,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
):
    slots = torch.randperm(3 * block_size, generator=generator)[:tokens]
    slots[tokens // 2] = -1
    inputs = {
        "k": torch.randn(tokens, num_kv_heads, head_dim, generator=generator).to(dtype),
        "v": torch.randn(tokens, num_kv_heads, head_dim, generator=generator).to(dtype),
        "kv": torch.randn(3, num_kv_heads, block_size, 2 * head_dim, generator=generator).to(dtype),
        "slot_mapping": slots,
    }
    return inputs, {}


KV_CACHE_WRITE = OwnOp(
    "kv_cache_write",
    lambda i, a: i["kv"],
    reference,
    sample,
    {"float32": EXACT, "bfloat16": EXACT},
    updates=("kv",),
)
