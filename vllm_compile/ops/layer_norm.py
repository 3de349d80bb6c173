"""LayerNorm (Ba et al. 2016), rounded once, as torch does."""

import torch

from . import rms_norm
from .base import OwnOp, like


def reference(
    x: torch.Tensor, eps: float, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., D], weight and bias [D], if there are any -> [..., D]; all of it in float32, the result in x's dtype."""
    scale, shift = (None if vector is None else vector.float() for vector in (weight, bias))
    return torch.nn.functional.layer_norm(x.float(), x.shape[-1:], scale, shift, eps).to(x.dtype)


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, width: int = 96):
    inputs, attributes = rms_norm.sample(generator, dtype, tokens, width)
    return {**inputs, "bias": torch.randn(width, generator=generator).to(dtype)}, attributes


LAYER_NORM = OwnOp(
    "layer_norm", lambda i, a: like(i["x"]), reference, sample, rms_norm.TOLERANCE, weights=("weight", "bias")
)
