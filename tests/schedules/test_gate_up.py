"""`gate_up_silu` against its reference: every variant, dtype and instruction level, odd sizes."""

import pytest
import torch

from vllm_compile.ops import GATE_UP_SILU
from vllm_compile.schedules.cpu.gate_up import GateUpSilu

from . import harness
from .levels import HOST
from .test_linear import assert_every_tile_matches, compile_family, dtypes, levels

FAMILY = GateUpSilu(packed=False)


@levels
@dtypes
@pytest.mark.parametrize(("K", "intermediate"), [(96, 64), (131, 83)], ids=["even", "odd"])
def test_matches_reference_in_every_batch(target, dtype, K, intermediate, generator, tmp_path):
    def sample(tokens):
        return GATE_UP_SILU.sample(generator, dtype, tokens, K, intermediate)[0]

    spec = harness.op_spec(GATE_UP_SILU, sample(5), {})
    kernels = compile_family(FAMILY, spec, target, tmp_path)
    assert_every_tile_matches(GATE_UP_SILU, FAMILY, spec, target, kernels, sample)


@pytest.fixture
def compiled(generator, tmp_path):
    target = HOST
    inputs, _ = GATE_UP_SILU.sample(generator, torch.bfloat16, 9, 96, 80)
    spec = harness.op_spec(GATE_UP_SILU, inputs, {})
    kernel = compile_family(FAMILY, spec, target, tmp_path, min_tokens=4)[4]
    return inputs, lambda given: harness.run(kernel, FAMILY, spec, target, given)


def test_large_gates_saturate(compiled):
    """silu(-large) is 0 and silu(large) the identity, where exp has left its range."""
    inputs, call = compiled
    inputs = {**inputs, "x": inputs["x"] * 100}
    expected = harness.results(GATE_UP_SILU, inputs, {})
    actual = call(inputs)
    assert actual[0].isfinite().all()
    torch.testing.assert_close(actual[0], expected[0], rtol=2**-6, atol=1.0)


def test_comparison_sees_gate_and_up_swapped(compiled):
    inputs, call = compiled
    expected = harness.results(GATE_UP_SILU, inputs, {})
    harness.assert_matches(GATE_UP_SILU, call(inputs), expected)
    swapped = torch.cat(inputs["weight"].chunk(2)[::-1])
    with pytest.raises(AssertionError):
        harness.assert_matches(GATE_UP_SILU, call({**inputs, "weight": swapped}), expected)


def test_comparison_sees_one_wrong_weight(compiled):
    inputs, call = compiled
    expected = harness.results(GATE_UP_SILU, inputs, {})
    weight = inputs["weight"].clone()
    weight[-1, -1] += 2
    with pytest.raises(AssertionError):
        harness.assert_matches(GATE_UP_SILU, call({**inputs, "weight": weight}), expected)
