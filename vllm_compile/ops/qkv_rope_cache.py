"""Rotary embedding of q and k, and the write of k and v into the paged KV cache, in one pass."""

import torch
from tvm import relax

from .base import OwnOp, Tolerance

TOLERANCE = {
    "float32": Tolerance(1e-6, 1e-6, "two products and a sum, possibly contracted to a fused multiply-add"),
    "bfloat16": Tolerance(2**-7, 1e-3, "each product is rounded to bf16 before the sum, as in Hugging Face"),
}


def rotate(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotate the two halves of the last axis (Su et al. 2021, in the half-split order of GPT-NeoX)."""
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos_TD[:, None] + torch.cat([-second, first], dim=-1) * sin_TD[:, None]


def reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> torch.Tensor:
    """Returns rotated q [T, H, D]; changes `kv` in place.

    qkv [T, (H + 2*KH) * D], cos and sin [T, D], kv [B, KH, N, 2*D] (K then V in the last axis,
    any outer strides), slot_mapping [T] int64: block * N + offset, or -1 for a padding row that
    must not be written.
    """
    q, k, v = qkv.view(qkv.shape[0], -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    written = slot_mapping >= 0
    slots, block_size = slot_mapping[written], kv.shape[2]
    kv[slots // block_size, :, slots % block_size] = torch.cat([rotate(k, cos, sin), v], dim=-1)[written]
    return rotate(q, cos, sin)


def sample(
    generator: torch.Generator,
    dtype: torch.dtype,
    tokens: int = 7,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
):
    blocks = tokens // block_size + 3
    angle = torch.rand(tokens, head_dim // 2, generator=generator).repeat(1, 2) * 6.28
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    slots[tokens // 2] = -1
    inputs = {
        "qkv": torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(dtype),
        "cos": angle.cos().to(dtype),
        "sin": angle.sin().to(dtype),
        "kv": torch.randn(blocks, num_kv_heads, block_size, 2 * head_dim, generator=generator).to(dtype),
        "slot_mapping": slots,
    }
    return inputs, {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}


def infer(i, a):
    # A graph may carry leading unit axes; the token axis is the one before the last.
    q = relax.TensorType([*i["qkv"].shape.values[:-1], a["num_heads"], a["head_dim"]], i["qkv"].dtype)
    return relax.TupleType([q, i["kv"]])


QKV_ROPE_CACHE = OwnOp("qkv_rope_cache", infer, reference, sample, TOLERANCE, updates=("kv",))
