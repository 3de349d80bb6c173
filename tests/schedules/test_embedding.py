"""Embedding copies rows bit for bit, whatever the type of the ids."""

import pytest
import torch

from vllm_compile.ops import EMBEDDING
from vllm_compile.schedules.cpu.embedding import Embedding

from .harness import assert_matches, compile_variants, op_spec, results, run
from .levels import HOST, TARGETS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 100])
def test_rows_are_copied(width, dtype, ids_dtype, target, generator, tmp_path):
    inputs, attributes = EMBEDDING.sample(generator, dtype, tokens=71, rows=50, width=width)
    inputs["ids"] = inputs["ids"].to(ids_dtype)
    inputs["ids"][:2] = torch.tensor([0, 49])
    spec = op_spec(EMBEDDING, inputs, attributes)
    for kernel in compile_variants(Embedding(), spec, target, tmp_path).values():
        (actual,) = run(kernel, Embedding(), spec, target, inputs)
        assert torch.equal(actual, results(EMBEDDING, inputs, attributes)[0])


def test_odd_bit_patterns_and_misaligned_ids(generator, tmp_path):
    """NaN payloads and subnormals survive; ids may be a slice of a larger tensor."""
    target = HOST
    bits = torch.randint(-(2**15), 2**15, (30, 64), generator=generator, dtype=torch.int16)
    ids = torch.randint(0, 30, (9,), generator=generator, dtype=torch.int32)[1:]
    inputs = {"ids": ids, "table": bits.view(torch.bfloat16)}
    spec = op_spec(EMBEDDING, inputs, {})
    (actual,) = run(compile_variants(Embedding(), spec, target, tmp_path)[1], Embedding(), spec, target, inputs)
    assert torch.equal(actual.view(torch.int16), bits[ids.long()])


def test_comparison_sees_a_neighbouring_row(generator, tmp_path):
    target = HOST
    inputs, attributes = EMBEDDING.sample(generator, torch.float32)
    spec = op_spec(EMBEDDING, inputs, attributes)
    kernel = compile_variants(Embedding(), spec, target, tmp_path)[1]
    wrong = {**inputs, "ids": (inputs["ids"] + 1) % inputs["table"].shape[0]}
    actual = run(kernel, Embedding(), spec, target, wrong)
    with pytest.raises(AssertionError):
        assert_matches(EMBEDDING, actual, results(EMBEDDING, inputs, attributes))
