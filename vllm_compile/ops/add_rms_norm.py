"""Residual add followed by RMSNorm: one pass over memory instead of two."""

import torch
from tvm import relax

from . import rms_norm
from .base import OwnOp, like


def reference(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float):
    """x, residual [..., D], weight [D] -> (residual + x, rms_norm(residual + x)), both [..., D]."""
    total = residual + x
    return total, rms_norm.reference(total, weight, eps)


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, width: int = 96):
    inputs, attributes = rms_norm.sample(generator, dtype, tokens, width)
    residual_TD = torch.randn(tokens, width, generator=generator).to(dtype)
    return {"x": inputs["x"], "residual": residual_TD, "weight": inputs["weight"]}, attributes


ADD_RMS_NORM = OwnOp(
    "add_rms_norm",
    lambda i, a: relax.TupleType([like(i["x"]), like(i["x"])]),
    reference,
    sample,
    rms_norm.TOLERANCE,
    weights=("weight",),
)
