"""The most probable token: where a row of logits is largest."""

import torch
from tvm import relax

from .base import OwnOp, Tolerance

EXACT = Tolerance(0.0, 0.0, "indices")


def reference(logits: torch.Tensor) -> torch.Tensor:
    """logits [T, V] -> int64 [T, 1]: of equal ones the first.  With NaN among them it is any token that there is."""
    return logits.argmax(dim=-1, keepdim=True)


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, vocabulary: int = 200):
    """Whole numbers, so that a row has several largest."""
    return {"logits": torch.randn(tokens, vocabulary, generator=generator).round().to(dtype)}, {}


ARGMAX = OwnOp(
    "argmax",
    lambda i, a: relax.TensorType([*i["logits"].shape.values[:-1], 1], "int64"),
    reference,
    sample,
    {"float32": EXACT, "bfloat16": EXACT},
)
