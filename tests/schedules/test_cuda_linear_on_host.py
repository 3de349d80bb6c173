"""CUDA's `linear` and `gate_up_silu` on the CPU, thread by thread (tests/cuda_on_host): no GPU needed.

Each kernel is launched as TVM launches it, every variant at numbers of tokens that fit it and that do not.
"""

from functools import cache

import pytest
import torch

from tests.cuda_on_host.prim_func import prepare, run_kernel
from tests.cuda_on_host.runner import AVAILABLE, EmulationError
from vllm_compile import lossless
from vllm_compile.ops import GATE_UP_SILU, LINEAR
from vllm_compile.schedules.cuda.gate_up import GateUpSilu
from vllm_compile.schedules.cuda.linear import Linear
from vllm_compile.targets import cuda

from . import harness

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++ on x86-64 Linux")

TARGET = cuda.for_chip()
K = 576  # 9 blocks of 64: no multiple of the warps
FORMS = {
    "linear": (LINEAR, Linear, ()),
    "linear_bias_residual": (LINEAR, Linear, ("bias", "residual")),
    "gate_up_silu": (GATE_UP_SILU, GateUpSilu, ()),
}
KINDS = {"plain": False, "lossless": True}
TOKENS = (1, 2, 7, 8, 9, 16, 23)
PREFETCHING = 99
# Of stream kernels with 4 warps: lossless, token_tiles, row_tiles, stages, ahead.  Rounds of 1, 2, 3 and 6 steps.
ROUNDS = {
    "three": (True, 2, 1, 3, False),
    "six_ahead": (True, 1, 1, 3, True),
    "two_ahead_of_three_stages": (True, 1, 2, 3, True),
    "plain": (False, 2, 1, 3, False),
    "plain_ahead": (False, 1, 2, 3, True),
}
STEPS = 13  # of some warps, 14 of others


def sample(form, generator, tokens, n=96):
    op, _, optional = FORMS[form]
    width = {"intermediate": n // 2} if op is GATE_UP_SILU else {"N": n}
    inputs, _ = op.sample(generator, torch.bfloat16, tokens, K, **width)
    return {name: inputs[name] for name in ("x", "weight", *optional)}


def adversarial(weight, most):
    """Zeros of both signs, denormals, outliers down and up to `most`, and a row of zeros."""
    weight = weight.clone()
    weight[1] = 0
    weight[2, ::3] = 0
    weight[3, ::5] = -0.0
    weight[4, :60] = 1e-39  # denormal
    weight[5, 7] = 3e4
    weight[::7, 11] = -(2.0**-60)
    weight[-1, -1] = most
    return weight


@cache
def variants(form, kind, n=96):
    """Kernels by the number of tokens that they are made for, and one that prefetches."""
    op, family_of, _ = FORMS[form]
    spec = harness.op_spec(op, sample(form, torch.Generator(), 5, n), {})
    family = family_of(KINDS[kind])
    assert family.serves(spec, TARGET)
    configs = {v.min_tokens: v.config for v in family.variants(spec, TARGET)}
    # So few warps and stages that a block is left to prefetch.
    configs[PREFETCHING] = {**configs[1], "warps": 4, "stages": 2, "prefetch": 3}
    return {least: family.build(spec, config, TARGET) for least, config in configs.items()}


@pytest.fixture(scope="module", autouse=True)
def prepared():
    prepare(kernel for form in FORMS for kind in KINDS for kernel in variants(form, kind).values())


@pytest.fixture(params=[(form, kind) for form in FORMS for kind in KINDS], ids="-".join)
def case(request):
    return request.param


def run(form, kind, kernel, inputs, out=None, **options):
    """The result, written over nan or `out`."""
    op = FORMS[form][0]
    weight = inputs["weight"]
    if out is None:
        out = torch.full((len(inputs["x"]), len(weight) // (2 if op is GATE_UP_SILU else 1)), float("nan")).bfloat16()
    given = {**inputs, "weight": lossless.pack(weight) if KINDS[kind] else weight}
    report = run_kernel(kernel, *given.values(), out, early={"weight"}, **options)
    if len(out):
        assert report.launched == report.waited == (1, 1)
    return out


def test_matches_reference(case, generator):
    form, kind = case
    for tokens in TOKENS:
        inputs = sample(form, generator, tokens)
        expected = harness.results(FORMS[form][0], inputs, {})
        for kernel in variants(form, kind).values():
            harness.assert_matches(FORMS[form][0], (run(form, kind, kernel, inputs),), expected)


@pytest.mark.parametrize("name", ROUNDS)
def test_warps_of_many_steps(name, generator):
    """Stages and x loaded ahead keep step through several rounds, the last of which is cut short."""
    packed, token_tiles, row_tiles, stages, ahead = ROUNDS[name]
    kind = "lossless" if packed else "plain"
    inputs, _ = LINEAR.sample(generator, torch.bfloat16, 8 * token_tiles - 1, 64 * (4 * STEPS + 3), N=64)
    inputs = {key: inputs[key] for key in ("x", "weight")}
    config = {
        "kind": "stream",
        "token_tiles": token_tiles,
        "row_tiles": row_tiles,
        "warps": 4,
        "stages": stages,
        "prefetch": 0,
        "ahead": ahead,
        "lossless": packed,
    }
    kernel = Linear(packed).build(harness.op_spec(LINEAR, inputs, {}), config, TARGET)
    expected = harness.results(LINEAR, inputs, {})
    harness.assert_matches(LINEAR, (run("linear", kind, kernel, inputs),), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_residual_may_lie_where_the_sum_will(kind, generator):
    for tokens in TOKENS:
        inputs = sample("linear_bias_residual", generator, tokens)
        for kernel in variants("linear_bias_residual", kind).values():
            apart = run("linear_bias_residual", kind, kernel, inputs)
            sums = inputs["residual"].clone()
            run("linear_bias_residual", kind, kernel, {**inputs, "residual": sums}, out=sums)
            assert torch.equal(sums, apart)


def test_adversarial_weights(case, generator):
    form, kind = case
    for n in (96, 320):
        inputs = sample(form, generator, 9, n)
        # A gate near 0, by which the largest is multiplied, is all rounding.
        most = 1e3 if FORMS[form][0] is GATE_UP_SILU else 1e20
        inputs["weight"] = adversarial(inputs["weight"], most)
        expected = harness.results(FORMS[form][0], inputs, {})
        for kernel in variants(form, kind, n).values():
            harness.assert_matches(FORMS[form][0], (run(form, kind, kernel, inputs),), expected)


def test_comparison_sees_one_wrong_input(case, generator):
    form, kind = case
    inputs = sample(form, generator, 9)
    expected = harness.results(FORMS[form][0], inputs, {})
    kernel = variants(form, kind)[1]
    for name in inputs:
        changed = inputs[name].clone()
        changed.view(-1)[-1] += 4
        with pytest.raises(AssertionError):
            harness.assert_matches(FORMS[form][0], (run(form, kind, kernel, {**inputs, name: changed}),), expected)


def test_rows_do_not_depend_on_the_batch(case, generator):
    form, kind = case
    inputs = sample(form, generator, 23)
    for least, kernel in variants(form, kind).items():
        # Sums depend on the number of warps alone: all but the one that prefetches have as many.
        whole = run(form, kind, kernel if least == PREFETCHING else variants(form, kind)[1], inputs)
        for tokens in (1, 5, 12):
            part = {name: t[:tokens] if name in ("x", "residual") else t for name, t in inputs.items()}
            assert torch.equal(run(form, kind, kernel, part), whole[:tokens])


def test_order_of_threads_does_not_matter(case, generator):
    form, kind = case
    inputs = sample(form, generator, 9)
    results = [run(form, kind, variants(form, kind)[1], inputs, seed=seed) for seed in range(8)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_no_tokens(case, generator):
    inputs = {name: t[:0] if name in ("x", "residual") else t for name, t in sample(case[0], generator, 3).items()}
    assert len(run(*case, variants(*case)[1], inputs)) == 0


def test_only_weights_are_read_before_the_kernels_before_are_done(generator):
    inputs = sample("linear", generator, 3)
    out = torch.empty(3, 96, dtype=torch.bfloat16)
    with pytest.raises(EmulationError, match="reads weight before it waits for the kernels before"):
        run_kernel(variants("linear", "plain")[1], *inputs.values(), out, early=())
