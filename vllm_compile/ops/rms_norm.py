"""RMSNorm (Zhang & Sennrich 2019) with the roundings of Hugging Face's LlamaRMSNorm."""

import torch

from .base import OwnOp, Tolerance, like

TOLERANCE = {
    "float32": Tolerance(1e-5, 1e-6, "one fp32 sum of squares in another order, one rsqrt"),
    "bfloat16": Tolerance(2**-6, 1e-3, "two roundings to bf16 may each fall on the neighbour, up to 2**-7 away"),
}


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D], weight [D] -> [..., D]; the normalised value is rounded to the weight's dtype before scaling.

    A weight of x's dtype gives Llama's roundings, a float32 weight those of Gemma and OLMo 2.
    """
    x_fp32 = x.float()
    normed = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(weight.dtype)).to(x.dtype)


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, width: int = 96):
    x_TD = torch.randn(tokens, width, generator=generator).to(dtype)
    weight_D = (1 + 0.1 * torch.randn(width, generator=generator)).to(dtype)
    return {"x": x_TD, "weight": weight_D}, {"eps": 1e-5}


RMS_NORM = OwnOp("rms_norm", lambda i, a: like(i["x"]), reference, sample, TOLERANCE, weights=("weight",))
