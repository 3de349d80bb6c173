"""What is decided of greedy tokens, and what same tokens are."""

import torch

from .greedy import OPEN, decided, same_tokens


def test_all_is_decided_without_a_near_tie(generator):
    logits_NV = torch.stack([torch.randperm(40, generator=generator) for _ in range(5)]).float()
    assert decided(logits_NV) == logits_NV.argmax(-1).tolist()


def test_nothing_is_from_a_near_tie_on():
    """As near as a ten thousandth of the way to the middle; what cannot be chosen has no say in that."""
    logits_V = torch.arange(40.0)
    near_V = logits_V.clone()
    near_V[3] = 39 - 1e-3
    assert decided(torch.stack([logits_V, near_V, logits_V])) == [39, OPEN]
    near_V[3] = 39 - 1e-2
    near_V[4] = float("-inf")
    assert decided(torch.stack([logits_V, near_V, logits_V])) == [39, 39, 39]


def test_same_tokens():
    assert same_tokens([[1, 2], [3, 4, 5]], [[1, 2], [3, OPEN]])
    assert same_tokens([[9]], [[OPEN]])
    for ours in ([1, 3], [1], [1, 2, 2]):
        assert not same_tokens([ours], [[1, 2]])
    for ours in ([2, 2], []):
        assert not same_tokens([ours], [[1, OPEN]])
