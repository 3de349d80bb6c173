"""Linear layer with its epilogue: optional bias, optional residual add."""

import torch

from vllm_compile.products import linear as reference

from .base import OwnOp, Tolerance, like

TOLERANCE = {
    "float32": Tolerance(1e-4, 1e-4, "fp32 sums of K products in another order: error grows like sqrt(K) * 2**-24"),
    "bfloat16": Tolerance(2**-7, 2e-2, "fp32 accumulation in another order, then one rounding to bf16 per step"),
}


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, K: int = 96, N: int = 64):
    inputs = {
        "x": torch.randn(tokens, K, generator=generator).to(dtype),
        "weight": (torch.randn(N, K, generator=generator) * K**-0.5).to(dtype),
        "bias": torch.randn(N, generator=generator).to(dtype),
        "residual": torch.randn(tokens, N, generator=generator).to(dtype),
    }
    return inputs, {}


LINEAR = OwnOp(
    "linear",
    lambda i, a: like(i["x"], last=[a.get("out_features", i["weight"].shape.values[0])]),
    reference,
    sample,
    TOLERANCE,
    weights=("weight", "bias"),
)
