"""Causal grouped-query attention as a model states it, before a KV cache comes in."""

import torch
from tvm import relax

from . import paged_attention
from .base import OwnOp


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    layer: int,
    window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """q [1, H, T, D], k [1, KH, T, D], v [1, KH, T, DV] -> [1, T, H, DV]; `layer` numbers the KV cache it will use.

    `window` and `soft_cap` are those of `paged_attention`.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(group, 1) for t in (k, v))
    scores = q.float() @ k.transpose(-1, -2) * scale
    position = torch.arange(scores.shape[-1])
    unseen = paged_attention.unseen(position, position, window)
    weights = paged_attention.capped(scores, soft_cap).masked_fill(unseen, float("-inf")).softmax(-1)
    return (weights @ v).to(q.dtype).transpose(1, 2)


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 9, num_heads: int = 4, num_kv_heads: int = 2):
    shapes = {"q": num_heads, "k": num_kv_heads, "v": num_kv_heads}
    inputs = {name: torch.randn(1, heads, tokens, 32, generator=generator).to(dtype) for name, heads in shapes.items()}
    return inputs, {"scale": 32**-0.5, "layer": 0}


def infer(i, a):
    one, heads, tokens, _ = i["q"].shape.values
    return relax.TensorType([one, tokens, heads, i["v"].shape.values[3]], i["q"].dtype)


CAUSAL_ATTENTION = OwnOp(
    "causal_attention", infer, reference, sample, paged_attention.TOLERANCE, options=("window", "soft_cap")
)
