"""The gate of an MLP on its own: what is left of gate_up_silu behind a matrix product that a library computes."""

import torch
from torch.nn import functional

from .base import OwnOp, Tolerance, like


def reference(x: torch.Tensor) -> torch.Tensor:
    """x [T, 2*I], gates then ups -> [T, I], rounded as in Hugging Face's MLP."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, intermediate: int = 64):
    return {"x": torch.randn(tokens, 2 * intermediate, generator=generator).to(dtype)}, {}


SILU_MUL = OwnOp(
    "silu_mul",
    lambda i, a: like(i["x"], last=[i["x"].shape.values[-1] // 2]),
    reference,
    sample,
    {
        "float32": Tolerance(1e-5, 1e-6, "one exponential"),
        "bfloat16": Tolerance(2**-6, 1e-3, "silu, then the product, may fall on the neighbour, up to 2**-7 away"),
    },
)
