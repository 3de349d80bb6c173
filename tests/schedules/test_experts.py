"""`expert_linear` and `expert_gate_up_silu`: every dtype and instruction level, odd sizes, groups of every size."""

import dataclasses

import pytest
import torch

from vllm_compile.ops import EXPERT_GATE_UP_SILU, EXPERT_LINEAR, LINEAR, ROUTE
from vllm_compile.schedules.cpu.experts import ExpertGateUpSilu, ExpertLinear
from vllm_compile.schedules.cpu.linear import Linear

from . import harness
from .levels import HOST
from .test_linear import dtypes, levels

FAMILIES = {"linear": (EXPERT_LINEAR, ExpertLinear()), "gate_up_silu": (EXPERT_GATE_UP_SILU, ExpertGateUpSilu())}
ops = pytest.mark.parametrize("op", FAMILIES)
EXPERTS, TOP_K = 5, 3


def routed(logits, top_k=TOP_K):
    experts, _, order, ends = ROUTE.reference(logits, top_k, normalise=True)
    return {"experts": experts, "order": order, "ends": ends}


def sample(op, generator, dtype, tokens, K=96, N=64):
    return FAMILIES[op][0].sample(generator, dtype, tokens, K, N, EXPERTS, TOP_K)[0]


def build(op, inputs, target, folder):
    """min_tokens -> what a kernel gives for inputs."""
    operator, family = FAMILIES[op]
    spec = harness.op_spec(operator, inputs, {})
    kernels = harness.compile_variants(family, spec, target, folder)
    return {
        minimum: lambda given, kernel=kernel: harness.run(kernel, family, spec, target, given)
        for minimum, kernel in kernels.items()
    }


def reference(op, inputs):
    return harness.results(FAMILIES[op][0], inputs, {})


def assert_matches(op, actual, inputs):
    harness.assert_matches(FAMILIES[op][0], actual, reference(op, inputs))


@levels
@dtypes
@ops
@pytest.mark.parametrize(("K", "N"), [(96, 64), (131, 83)], ids=["even", "odd"])
def test_matches_reference_in_every_batch(op, target, dtype, K, N, generator, tmp_path):
    """A token's result has the same bits alone and among others."""
    kernels = build(op, sample(op, generator, dtype, 5, K, N), target, tmp_path)
    for tokens in (1, 2, 7, 70):
        inputs = sample(op, generator, dtype, tokens, K, N)
        results = [call(inputs) for minimum, call in kernels.items() if minimum <= tokens]
        for result in results:
            assert_matches(op, result, inputs)
            assert torch.equal(result[0], results[0][0])
        experts = inputs["experts"][:1]
        order = experts.argsort(stable=True)
        alone = {"experts": experts, "order": order.int(), "ends": torch.arange(1, TOP_K + 1, dtype=torch.int32)[None]}
        first = kernels[1]({**inputs, "x": inputs["x"][:1], **alone})[0]
        assert torch.equal(first, results[0][0][:1])


@pytest.fixture
def compiled(request, generator, tmp_path):
    """Inputs of 9 tokens, and the kernel for several."""
    op = request.getfixturevalue("op")
    inputs = sample(op, generator, torch.bfloat16, 9)
    return inputs, build(op, inputs, HOST, tmp_path)[2]


@ops
def test_groups_of_every_size(op, compiled, generator):
    """All tokens to the same experts, experts without a token, one token, none."""
    inputs, call = compiled
    logits = torch.randn(9, EXPERTS, generator=generator)
    logits[:, :TOP_K] += 50
    same = {**inputs, **routed(logits)}
    assert set(same["experts"].flatten().tolist()) == set(range(TOP_K))
    assert_matches(op, call(same), same)
    for tokens in (0, 1):
        few = {name: t if name == "weight" else t[:tokens] for name, t in (inputs | routed(logits[:tokens])).items()}
        assert_matches(op, call(few), few)


@ops
def test_experts_that_nobody_chose_are_not_read(op, compiled, generator):
    """Their weights may be anything."""
    inputs, call = compiled
    logits = torch.randn(9, EXPERTS, generator=generator)
    logits[:, -1] -= 100
    inputs = {**inputs, **routed(logits)}
    before = call(inputs)[0]
    inputs["weight"][-1] = float("nan")
    assert torch.equal(call(inputs)[0], before)


@dtypes
def test_passes_over_a_long_k_keep_the_bits(dtype, generator, tmp_path):
    """A group of more rows than a chunk has."""
    operator, family = FAMILIES["linear"]
    inputs = operator.sample(generator, dtype, 500, 1031, 83, 2, 1)[0]
    spec = harness.op_spec(operator, inputs, {})
    results = []
    for l2_bytes in (1 << 30, 1 << 15):
        sized = dataclasses.replace(HOST, l2_bytes=l2_bytes)
        kernel = harness.compile_variants(family, spec, sized, tmp_path)[2]
        results.append(harness.run(kernel, family, spec, sized, inputs)[0])
        (tmp_path / f"{family.name}.so").unlink()
    assert_matches("linear", results[1:], inputs)
    assert torch.equal(*results)


def test_one_expert_is_a_linear_layer(generator, tmp_path):
    """To the last bit."""
    inputs = EXPERT_LINEAR.sample(generator, torch.bfloat16, 9, 96, 64, 1, 1)[0]
    plain = {"x": inputs["x"].flatten(0, 1), "weight": inputs["weight"][0]}
    spec = harness.op_spec(LINEAR, plain, {})
    kernel = harness.compile_variants(Linear(packed=False), spec, HOST, tmp_path)[1]
    linear = harness.run(kernel, Linear(packed=False), spec, HOST, plain)[0]
    assert torch.equal(build("linear", inputs, HOST, tmp_path)[2](inputs)[0].flatten(0, 1), linear)


@ops
def test_comparison_sees_one_experts_weights(op, compiled):
    inputs, call = compiled
    assert_matches(op, call(inputs), inputs)
    chosen = int(inputs["experts"][-1, -1])
    changed = inputs["weight"].clone()
    changed[chosen] *= -1
    with pytest.raises(AssertionError):
        assert_matches(op, call({**inputs, "weight": changed}), inputs)


@ops
def test_comparison_sees_a_token_sent_to_another_expert(op, compiled, generator):
    inputs, call = compiled
    with pytest.raises(AssertionError):
        assert_matches(op, call({**inputs, **routed(torch.randn(9, EXPERTS, generator=generator))}), inputs)
