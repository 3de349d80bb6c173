"""Linear layers of heads: every dtype and instruction level, odd sizes, in every batch."""

import pytest
import torch

from vllm_compile.ops import HEAD_LINEAR, LINEAR
from vllm_compile.schedules.cpu.head_linear import HeadLinear
from vllm_compile.schedules.cpu.linear import Linear

from . import harness
from .levels import HOST
from .test_linear import dtypes, levels


class FewVariants(HeadLinear):
    """With the tiles for the fewest and for the most tokens; tests of `linear` have the others."""

    def variants(self, spec, target):
        every = super().variants(spec, target)
        return every[:1] + every[-1:]


FAMILY = FewVariants()


def build(inputs, target, folder):
    """min_tokens -> what a kernel gives for inputs."""
    spec = harness.op_spec(HEAD_LINEAR, inputs, {})
    kernels = harness.compile_variants(FAMILY, spec, target, folder)
    return {m: lambda given, k=kernel: harness.run(k, FAMILY, spec, target, given)[0] for m, kernel in kernels.items()}


@levels
@dtypes
@pytest.mark.parametrize(("heads", "K", "N"), [(4, 96, 64), (3, 131, 83)], ids=["even", "odd"])
def test_matches_reference_in_every_batch(heads, K, N, target, dtype, generator, tmp_path):
    """A token's result has the same bits alone and among others."""
    sizes = {"num_heads": heads, "K": K, "N": N}
    kernels = build(HEAD_LINEAR.sample(generator, dtype, 5, **sizes)[0], target, tmp_path)
    for tokens in (1, 2, 7, 70):
        inputs, _ = HEAD_LINEAR.sample(generator, dtype, tokens, **sizes)
        results = [call(inputs) for minimum, call in kernels.items() if minimum <= tokens]
        for result in results:
            harness.assert_matches(HEAD_LINEAR, (result,), harness.results(HEAD_LINEAR, inputs, {}))
            assert torch.equal(result, results[0])
        assert torch.equal(kernels[1]({**inputs, "x": inputs["x"][:1]}), results[0][:1])


def test_each_head_is_a_linear_layer(generator, tmp_path):
    """To the last bit, many chunks of tokens long."""
    inputs, _ = HEAD_LINEAR.sample(generator, torch.bfloat16, 900, num_heads=2)
    result = build(inputs, HOST, tmp_path)[1](inputs)
    for head in range(2):
        plain = {"x": inputs["x"][:, head].contiguous(), "weight": inputs["weight"][head]}
        spec = harness.op_spec(LINEAR, plain, {})
        kernel = harness.compile_variants(Linear(packed=False), spec, HOST, tmp_path)[1]
        assert torch.equal(harness.run(kernel, Linear(packed=False), spec, HOST, plain)[0], result[:, head])
        (tmp_path / "cpu.linear.so").unlink()


def test_comparison_sees_the_weight_of_another_head(generator, tmp_path):
    inputs, _ = HEAD_LINEAR.sample(generator, torch.bfloat16, 9)
    result = build(inputs, HOST, tmp_path)[1](inputs)
    swapped = {**inputs, "weight": inputs["weight"].roll(1, 0)}
    with pytest.raises(AssertionError):
        harness.assert_matches(HEAD_LINEAR, (result,), harness.results(HEAD_LINEAR, swapped, {}))
