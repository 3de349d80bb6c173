"""Scores of experts, of those groups alone whose best one is among the largest (DeepSeek-V2); the others are zero."""

import torch

from .base import OwnOp, like
from .embedding import EXACT


def outside(scores: torch.Tensor, groups: int, kept: int) -> torch.Tensor:
    """bool [T, E]: what is not in the `kept` best of `groups` equal parts of E; of equally good ones, the first are."""
    best_TG = scores.view(scores.shape[0], groups, scores.shape[1] // groups).amax(-1)
    last = best_TG.sort(dim=-1, descending=True, stable=True).indices[:, kept:]
    return (
        torch.zeros_like(best_TG, dtype=torch.bool)
        .scatter(1, last, True)
        .repeat_interleave(scores.shape[1] // groups, dim=1)
    )


def reference(scores: torch.Tensor, groups: int, kept: int) -> torch.Tensor:
    """scores [T, E] -> [T, E]"""
    return scores.masked_fill(outside(scores, groups, kept), 0)


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, experts: int = 12):
    return {"scores": torch.rand(tokens, experts, generator=generator).to(dtype)}, {"groups": 4, "kept": 2}


LIMIT_GROUPS = OwnOp(
    "limit_groups", lambda i, a: like(i["scores"]), reference, sample, {"float32": EXACT, "bfloat16": EXACT}
)
