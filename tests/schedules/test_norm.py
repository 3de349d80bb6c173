"""RMSNorm with and without the residual add: against the reference, row by row, on misaligned tensors."""

import pytest
import torch

from vllm_compile.ops import ADD_RMS_NORM, RMS_NORM
from vllm_compile.schedules.cpu.norm import AddRMSNorm, RMSNorm

from .harness import assert_matches, compile_variants, op_spec, results, run
from .levels import HOST, TARGETS

CASES = [(RMS_NORM, RMSNorm()), (ADD_RMS_NORM, AddRMSNorm())]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "family"), CASES, ids=lambda case: getattr(case, "name", None))
@pytest.mark.parametrize("width", [2048, 100])
def test_every_variant_matches_and_rows_do_not_depend_on_the_batch(
    op, family, width, dtype, target, generator, tmp_path
):
    inputs, attributes = op.sample(generator, dtype, tokens=67, width=width)
    spec = op_spec(op, inputs, attributes)
    kernels = compile_variants(family, spec, target, tmp_path)
    expected = results(op, inputs, attributes)
    outputs = {name: run(kernel, family, spec, target, inputs) for name, kernel in kernels.items()}
    for actual in outputs.values():
        assert_matches(op, actual, expected)
    one = {name: tensor if name == "weight" else tensor[5:6] for name, tensor in inputs.items()}
    for kernel in kernels.values():
        alone = run(kernel, family, spec, target, one)
        for actual in outputs.values():
            assert all(torch.equal(row[0], rows[5]) for row, rows in zip(alone, actual, strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_bf16_rounds_where_the_reference_rounds(target, generator, tmp_path):
    inputs, attributes = ADD_RMS_NORM.sample(generator, torch.bfloat16, tokens=40, width=256)
    spec = op_spec(ADD_RMS_NORM, inputs, attributes)
    kernel = compile_variants(AddRMSNorm(), spec, target, tmp_path)[1]
    actual = run(kernel, AddRMSNorm(), spec, target, inputs)
    total, normed = results(ADD_RMS_NORM, inputs, attributes)
    assert torch.equal(actual[0], total)
    # A sum of squares in another order moves a value across a rounding boundary once in thousands.
    assert (actual[1] != normed).float().mean() < 5e-3


@pytest.mark.parametrize("target", TARGETS)
def test_tensors_need_no_alignment_and_no_tokens(target, generator, tmp_path):
    inputs, attributes = RMS_NORM.sample(generator, torch.float32, tokens=4, width=64)
    spec = op_spec(RMS_NORM, inputs, attributes)
    kernel = compile_variants(RMSNorm(), spec, target, tmp_path)[1]
    odd = {name: torch.empty(tensor.numel() + 1)[1:].view_as(tensor).copy_(tensor) for name, tensor in inputs.items()}
    out = torch.empty(4 * 64 + 3)[3:].view(4, 64)
    kernel(*odd.values(), out)
    assert_matches(RMS_NORM, (out,), results(RMS_NORM, inputs, attributes))
    kernel(torch.empty(0, 64), inputs["weight"], torch.empty(0, 64))


def test_comparison_sees_a_wrong_epsilon(generator, tmp_path):
    target = HOST
    inputs, attributes = RMS_NORM.sample(generator, torch.float32)
    spec = op_spec(RMS_NORM, inputs, {"eps": 1e-2})
    kernel = compile_variants(RMSNorm(), spec, target, tmp_path)[1]
    actual = run(kernel, RMSNorm(), spec, target, inputs)
    with pytest.raises(AssertionError):
        assert_matches(RMS_NORM, actual, results(RMS_NORM, inputs, attributes))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("heads", [1, 3])
def test_float32_weights_and_heads(heads, target, generator, tmp_path):
    """bfloat16 rows scaled before they are rounded (Gemma), each head a row of its own (Qwen 3)."""
    inputs, attributes = RMS_NORM.sample(generator, torch.bfloat16, tokens=12, width=64)
    inputs = {
        "x": inputs["x"].view(12 // heads, *([heads] if heads > 1 else []), 64),
        "weight": inputs["weight"].float(),
    }
    spec = op_spec(RMS_NORM, inputs, attributes)
    actual = run(compile_variants(RMSNorm(), spec, target, tmp_path)[1], RMSNorm(), spec, target, inputs)
    expected = results(RMS_NORM, inputs, attributes)
    assert_matches(RMS_NORM, actual, expected)
    early = results(RMS_NORM, {**inputs, "weight": inputs["weight"].bfloat16()}, attributes)
    assert (actual[0] != expected[0]).float().mean() < 5e-3
    assert (early[0] != expected[0]).float().mean() > 5e-2, "the roundings differ"
