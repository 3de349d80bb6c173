"""Greedy tokens of computations that round differently: the same, up to where a model's logits nearly tie."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Of the distance between a row's largest and its middle logit.  Sums in another order differ by some 1e-6 of it; one
# row in thousands is as near a tie as this, and what a model goes on with is then anybody's.
NEAR = 1e-4
OPEN = None  # in the place of all tokens from a near tie on
Tokens = list[int | None]


def decided(logits_NV: torch.Tensor) -> Tokens:
    """Most probable tokens of rows of logits; from the first row on whose two largest nearly tie, `OPEN`."""
    logits_NV = logits_NV.double()
    first_N, second_N = logits_NV.topk(2).values.unbind(-1)
    clear_N = first_N - second_N > NEAR * (first_N - logits_NV.median(-1).values)
    tokens = logits_NV.argmax(-1).tolist()
    return tokens if clear_N.all() else [*tokens[: int(clear_N.int().cumprod(0).sum())], OPEN]


def same_tokens(ours: Sequence[list[int]], theirs: Sequence[Tokens]) -> bool:
    """Whether each request has the tokens that are decided for it, and no others unless the rest is open."""
    return all(_same(*pair) for pair in zip(ours, theirs, strict=True))


def _same(ours: list[int], theirs: Tokens) -> bool:
    if theirs[-1] is OPEN:
        return ours[: len(theirs) - 1] == theirs[:-1]
    return ours == theirs
