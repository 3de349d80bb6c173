"""LayerNorm with and without bias: against the reference, row by row."""

import pytest
import torch

from vllm_compile.ops import LAYER_NORM
from vllm_compile.schedules.cpu.layer_norm import LayerNorm

from .harness import assert_matches, compile_variants, op_spec, results, run
from .levels import HOST, TARGETS

FAMILY = LayerNorm()
# A mean of about 3 is rounded by up to 2**-23, and sums before it are: the error of results near 0.
MEAN_ROUNDS = 5e-6


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [512, 100])
def test_every_variant_matches_and_rows_do_not_depend_on_the_batch(width, bias, dtype, target, generator, tmp_path):
    inputs, attributes = LAYER_NORM.sample(generator, dtype, tokens=67, width=width)
    inputs["x"] += 3  # a mean that matters
    if not bias:
        del inputs["bias"]
    spec = op_spec(LAYER_NORM, inputs, attributes)
    kernels = compile_variants(FAMILY, spec, target, tmp_path)
    expected = results(LAYER_NORM, inputs, attributes)[0]
    tolerance = LAYER_NORM.tolerance[str(dtype).removeprefix("torch.")]
    for kernel in kernels.values():
        actual = run(kernel, FAMILY, spec, target, inputs)
        torch.testing.assert_close(actual[0], expected, rtol=tolerance.rtol, atol=max(tolerance.atol, MEAN_ROUNDS))
        alone = run(kernel, FAMILY, spec, target, {**inputs, "x": inputs["x"][5:6]})
        assert torch.equal(alone[0][0], actual[0][5])


def test_heads_and_a_float32_weight(generator, tmp_path):
    """[T, H, D], each head a row of its own, as Cohere normalises queries."""
    inputs, attributes = LAYER_NORM.sample(generator, torch.bfloat16, tokens=12, width=64)
    inputs = {"x": inputs["x"].view(4, 3, 64), "weight": inputs["weight"].float()}
    spec = op_spec(LAYER_NORM, inputs, attributes)
    actual = run(compile_variants(FAMILY, spec, HOST, tmp_path)[1], FAMILY, spec, HOST, inputs)
    assert_matches(LAYER_NORM, actual, results(LAYER_NORM, inputs, attributes))


def test_comparison_sees_a_missing_bias(generator, tmp_path):
    inputs, attributes = LAYER_NORM.sample(generator, torch.float32)
    spec = op_spec(LAYER_NORM, inputs, attributes)
    kernel = compile_variants(FAMILY, spec, HOST, tmp_path)[1]
    actual = run(kernel, FAMILY, spec, HOST, {**inputs, "bias": torch.zeros_like(inputs["bias"])})
    with pytest.raises(AssertionError):
        assert_matches(LAYER_NORM, actual, results(LAYER_NORM, inputs, attributes))
