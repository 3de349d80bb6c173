"""Row lookup: token embeddings, and tables indexed by position (the cosines and sines of RoPE)."""

import torch
from tvm import relax

from .base import OwnOp, Tolerance

EXACT = Tolerance(0.0, 0.0, "rows are copied")


def reference(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ids [...] int32 or int64, table [V, D] -> [..., D]; every id must lie in [0, V)."""
    return table[ids.long()]


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, rows: int = 40, width: int = 96):
    table = torch.randn(rows, width, generator=generator).to(dtype)
    return {"ids": torch.randint(0, rows, (tokens,), generator=generator), "table": table}, {}


EMBEDDING = OwnOp(
    "embedding",
    lambda i, a: relax.TensorType([*i["ids"].shape.values, i["table"].shape.values[1]], i["table"].dtype),
    reference,
    sample,
    {"float32": EXACT, "bfloat16": EXACT},
    weights=("table",),
)
