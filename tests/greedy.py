"""Greedy tokens of computations that round differently: the same, up to where a model's logits nearly tie."""

from collections.abc import Sequence

import torch

# Of the distance between a row's largest and its middle logit.  Sums in another order differ by less than 1e-5 of it;
# one row in thousands is as near a tie as this, and what a model goes on with is then anybody's.
NEAR = 1e-4


def decided(logits_NV: torch.Tensor) -> list[int]:
    """Most probable tokens of rows of logits, up to the first row whose two largest nearly tie."""
    logits_NV = logits_NV.double()
    first_N, second_N = logits_NV.topk(2).values.unbind(-1)
    clear_N = first_N - second_N > NEAR * (first_N - logits_NV.median(-1).values)
    return logits_NV.argmax(-1)[: int(clear_N.int().cumprod(0).sum())].tolist()


def begin_with(tokens: Sequence[list[int]], decided: Sequence[list[int]]) -> bool:
    """Whether each request's tokens begin with those that are decided for it."""
    return all(ours[: len(theirs)] == theirs for ours, theirs in zip(tokens, decided, strict=True))
