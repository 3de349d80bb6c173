"""The rules of accuracy.py on logits and layers that are made up, with and without what they must notice."""

import pytest
import torch

from vllm_compile.accuracy import BF16_RATIO, OUTLIERS, as_accurate, as_accurate_by_token, outliers, relative_error

TOKENS, VOCABULARY = 400, 50
ROUNDING = 1e-2


@pytest.fixture
def exact(generator) -> torch.Tensor:
    return torch.randn(TOKENS, VOCABULARY, generator=generator)


def rounded(exact_TV: torch.Tensor, generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    return exact_TV + scale * ROUNDING * torch.randn(exact_TV.shape, generator=generator)


def rerouted(x_TV: torch.Tensor, share: float) -> torch.Tensor:
    """The first tokens were served by another expert."""
    changed = x_TV.clone()
    changed[: int(share * TOKENS)] *= -1
    return changed


# 400 * 50 errors: the ratio of two norms varies by 1 %, that of the median token by about as much.
@pytest.mark.parametrize(("scale", "passes"), [(BF16_RATIO - 0.05, True), (BF16_RATIO + 0.05, False)])
def test_both_rules_see_a_larger_error_of_all_tokens(scale, passes, exact, generator):
    ours, reference = rounded(exact, generator, scale), rounded(exact, generator)
    assert as_accurate(ours, reference, exact) == passes
    assert as_accurate_by_token(ours, reference, exact, [(reference, reference)]) == passes


@pytest.mark.parametrize("which", ["ours", "reference"])
def test_near_ties_decide_nothing_where_experts_are(which, exact, generator):
    """On either side; the norm over all tokens is theirs alone."""
    pair = {name: rounded(exact, generator) for name in ("ours", "reference")}
    layer = rounded(exact, generator)
    few = {**pair, which: rerouted(pair[which], 0.02)}
    assert as_accurate_by_token(few["ours"], few["reference"], exact, [(rerouted(layer, 0.02), exact)])
    assert as_accurate(few["ours"], few["reference"], exact) == (which == "reference")


def test_an_expert_of_few_tokens_is_seen_in_its_layer(exact, generator):
    """Too few for the median token to be one of them."""
    ours, reference, layer = (rounded(exact, generator) for _ in range(3))
    assert as_accurate_by_token(ours, reference, exact, [(layer, exact)] * 2)
    wrong = rerouted(layer, OUTLIERS + 0.01)
    assert not as_accurate_by_token(rerouted(ours, OUTLIERS + 0.01), reference, exact, [(layer, exact), (wrong, exact)])


def test_where_most_tokens_are_equal_to_the_last_bit(exact, generator):
    """Tokens that were rounded once more are no outliers beside them, those of another expert are."""
    rounded_once_more = exact.clone()
    rounded_once_more[: TOKENS // 4] = exact[: TOKENS // 4].bfloat16()
    assert outliers(rounded_once_more, exact) == 0
    assert outliers(rerouted(exact, OUTLIERS + 0.01), exact) > OUTLIERS


def test_nothing_beside_nothing(exact):
    assert relative_error(torch.zeros_like(exact), torch.zeros_like(exact)) == 0
    assert relative_error(exact, torch.zeros_like(exact)) == float("inf")


def test_tokens_that_everyone_makes_nothing_of(exact, generator):
    """As of a padding token, whose embedding is zero; but not if one does make something of it."""
    exact[:3] = 0
    ours, reference, layer = (rounded(exact, generator) for _ in range(3))
    for values in (ours, reference, layer):
        values[:3] = 0
    assert as_accurate_by_token(ours, reference, exact, [(layer, exact)])
    assert outliers(layer, exact) == 0
    layer[:3, 0] = 1e-3
    assert outliers(layer, exact) == 3 / TOKENS


def test_not_a_number_is_never_accurate(exact, generator):
    ours, reference = rounded(exact, generator), rounded(exact, generator)
    broken = ours.clone()
    broken[0, 0] = torch.nan
    assert not as_accurate(broken, reference, exact)
    assert not as_accurate_by_token(broken, reference, exact, [(ours, exact)])
    assert outliers(torch.full_like(ours, torch.nan), exact) == 1
    assert outliers(exact, exact) == 0
