"""A mark between the decoder layers of a model: the identity, until the layers are outlined."""

import torch

from .base import OwnOp, like
from .embedding import EXACT


def reference(x: torch.Tensor, index: int) -> torch.Tensor:
    """x of any shape, unchanged.

    `index` i stands before layer i; for L layers, L stands behind the last layer and L + 1
    before the output projection.
    """
    return x


def sample(generator: torch.Generator, dtype: torch.dtype):
    return {"x": torch.randn(2, 8, generator=generator).to(dtype)}, {"index": 0}


LAYER_BOUNDARY = OwnOp(
    "layer_boundary", lambda i, a: like(i["x"]), reference, sample, {"float32": EXACT, "bfloat16": EXACT}
)
