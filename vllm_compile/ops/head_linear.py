"""A linear layer for each head, whose weight is that head's: what leads into a latent cache and out of it."""

import torch

from . import linear
from .base import OwnOp, like


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., H, K], weight [H, N, K] -> [..., H, N]; accumulates in fp32 and rounds once."""
    return torch.einsum("...hk,hnk->...hn", x.float(), weight.float()).to(x.dtype)


def sample(
    generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, num_heads: int = 4, K: int = 32, N: int = 48
):
    inputs = {
        "x": torch.randn(tokens, num_heads, K, generator=generator).to(dtype),
        "weight": (torch.randn(num_heads, N, K, generator=generator) * K**-0.5).to(dtype),
    }
    return inputs, {}


HEAD_LINEAR = OwnOp(
    "head_linear",
    lambda i, a: like(i["x"], last=[i["weight"].shape.values[1]]),
    reference,
    sample,
    linear.TOLERANCE,
    weights=("weight",),
)
