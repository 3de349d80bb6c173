"""Scores of experts, of those groups alone whose best ones are among the largest (DeepSeek-V2, V3)."""

import torch

from .base import OwnOp, like
from .embedding import EXACT


def outside(scores: torch.Tensor, groups: int, kept: int, best: int) -> torch.Tensor:
    """bool [T, E]: what is not in the `kept` best of `groups` equal parts of E; of equally good ones, the first are.

    A group is as good as the sum of its `best` largest scores.
    """
    parts_TGS = scores.view(scores.shape[0], groups, scores.shape[1] // groups)
    sum_TG = parts_TGS.topk(best, dim=-1).values.sum(-1)
    last = sum_TG.sort(dim=-1, descending=True, stable=True).indices[:, kept:]
    return (
        torch.zeros_like(sum_TG, dtype=torch.bool)
        .scatter(1, last, True)
        .repeat_interleave(scores.shape[1] // groups, dim=1)
    )


def reference(scores: torch.Tensor, groups: int, kept: int, best: int = 1, zeros: int = 0) -> torch.Tensor:
    """scores [T, E] -> [T, E]; the others' are minus infinity, or zero."""
    return scores.masked_fill(outside(scores, groups, kept, best), 0 if zeros else float("-inf"))


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, experts: int = 12):
    return {"scores": torch.rand(tokens, experts, generator=generator).to(dtype)}, {"groups": 4, "kept": 2}


LIMIT_GROUPS = OwnOp(
    "limit_groups",
    lambda i, a: like(i["scores"]),
    reference,
    sample,
    {"float32": EXACT, "bfloat16": EXACT},
    options=("best", "zeros"),
)
