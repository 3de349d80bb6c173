"""Attention over 262,144 cached tokens: a decode step and a chunk of a prefill at the far end, against float64."""

import pytest
import torch

from vllm_compile.accuracy import relative_error
from vllm_compile.ops import PAGED_ATTENTION

from .levels import HOST
from .test_attention import attend

LENGTH, BLOCK_SIZE = 1 << 18, 128
QUERIES = (1, 33)  # few rows share a cached token, many do
# Positions whose keys all queries look for: the first, either side of 2**17, one that only the chunk's last rows see.
NEEDLES = (0, (1 << 17) - 1, 1 << 17, LENGTH - 3)
# A result is a running float32 sum over the tokens, each step rounded (2**-24): their number's root of such errors
# (measured 1.0e-5, torch's own float32 2e-6).  In bfloat16 probabilities and results are rounded (2**-9 each).
ERROR = {torch.float32: LENGTH**0.5 * 2**-24, torch.bfloat16: 2**-8}


def far_sample(generator, dtype):
    """Two requests of that length; a needle weighs about as much as all other tokens together."""
    inputs, _ = PAGED_ATTENTION.sample(
        generator, dtype, tuple((n, LENGTH) for n in QUERIES), 2, 1, head_dim=32, block_size=BLOCK_SIZE
    )
    direction = torch.randn(32, generator=generator)
    direction *= 32**0.5 / direction.norm()
    inputs["q"] = (direction + 0.1 * inputs["q"].float()).to(dtype)
    for table in inputs["block_table"].tolist():
        for needle in NEEDLES:
            inputs["kv"][table[needle // BLOCK_SIZE], 0, needle % BLOCK_SIZE, :32] = 2 * direction.to(dtype)
    return inputs, {"scale": 32**-0.5}


def in_float64(inputs, attributes):
    return PAGED_ATTENTION.reference(**inputs | {"q": inputs["q"].double()}, **attributes)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
def test_matches_float64(dtype, generator):
    inputs, attributes = far_sample(generator, dtype)
    actual = attend(inputs, attributes, HOST)
    exact = in_float64(inputs, attributes)
    assert relative_error(actual, exact) < ERROR[dtype]
    for needle in NEEDLES:  # negative control: it shows if the block of one of them is another's
        for lost in inputs["block_table"]:
            lost[needle // BLOCK_SIZE] = lost[needle // BLOCK_SIZE - 7]
        assert relative_error(attend(inputs, attributes, HOST), exact) > 0.02


def test_a_window_at_the_far_end(generator):
    """It reads the last tokens only: all others may be anything."""
    inputs, attributes = far_sample(generator, torch.bfloat16)
    attributes |= {"window": 4096}
    first = (LENGTH - QUERIES[1] - 4096) // BLOCK_SIZE
    inputs["kv"][inputs["block_table"][:, :first].flatten().long()] = float("nan")
    actual = attend(inputs, attributes, HOST)
    inputs["kv"].nan_to_num_(0.0)
    assert relative_error(actual, in_float64(inputs, attributes)) < ERROR[torch.bfloat16]
