"""`route` against its reference: any number of tokens and experts, ties, groups of every size; on a CPU, and ROCm's."""

from dataclasses import replace

import pytest
import torch

from tests.models import group_router
from tests.rocm_on_host import needs_opencl
from tests.rocm_on_host.runner import OnHost
from vllm_compile.errors import UnsupportedError
from vllm_compile.ops import ROUTE
from vllm_compile.schedules.cpu.route import Route
from vllm_compile.schedules.select import choose
from vllm_compile.targets.rocm import for_arch

from . import harness
from .levels import HOST

FAMILY = Route()
GPU = for_arch()


def on_cpu(spec, folder):
    kernels = harness.compile_variants(FAMILY, spec, HOST, folder)

    def run(inputs):
        serves = max(minimum for minimum in kernels if minimum <= max(1, len(inputs["logits"])))
        return harness.run(kernels[serves], FAMILY, spec, HOST, inputs)

    return run


def on_gpu(spec, folder):
    """As a CPU emulates it."""
    on_host = OnHost({"route": choose(spec, GPU).family.build(spec, {}, GPU)}, GPU, folder)

    def run(inputs):
        outputs = harness.poisoned(spec, len(inputs["logits"]))
        launches = on_host.run("route", *inputs.values(), *outputs)
        assert len(launches) == (2 if len(inputs["logits"]) else 0)
        return outputs

    return run


def calling(build, folder_of):
    """`kernel(logits, top_k, normalise, bias, **options)`: what it gives; one is built for each kind of call."""
    built = {}

    def call(logits, top_k=2, normalise=True, bias=None, **options):
        inputs = {"logits": logits} if bias is None else {"logits": logits, "bias": bias}
        spec = harness.op_spec(ROUTE, inputs, {"top_k": top_k, "normalise": normalise, **options})
        if spec not in built:
            built[spec] = build(spec, folder_of.mktemp("route"))
        return built[spec](inputs)

    return call


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return calling(on_cpu, tmp_path_factory)


@pytest.fixture(scope="module", params=[on_cpu, pytest.param(on_gpu, marks=needs_opencl)])
def each_kernel(request, tmp_path_factory):
    return calling(request.param, tmp_path_factory)


def expected(logits, top_k=2, normalise=True, **options):
    return ROUTE.reference(logits, top_k, normalise, **options)


def apart(judged):
    """Rows of judged [T, E] whose numbers no rounding of an exponential brings into another order."""
    return (judged.sort(-1).values.diff() > 1e-5).all(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("experts", "top_k", "normalise"), [(8, 2, True), (61, 6, False), (4, 4, True), (1, 1, False)])
def test_matches_reference(dtype, experts, top_k, normalise, generator, kernel):
    """bfloat16 logits have many ties."""
    for tokens in (0, 1, 2, 7, 300):
        logits = (torch.randn(tokens, experts, generator=generator) * 3).to(dtype)
        harness.assert_matches(ROUTE, kernel(logits, top_k, normalise), expected(logits, top_k, normalise))


@needs_opencl
@pytest.mark.parametrize(
    ("dtype", "experts", "top_k", "normalise", "most"),
    [(torch.bfloat16, 8, 2, True, 90), (torch.float32, 1, 1, False, 5), (torch.float32, 70, 6, False, 180)],
)
def test_on_a_gpu(dtype, experts, top_k, normalise, most, generator, tmp_path_factory):
    """At last of more experts than a wave has lanes, and more entries than the sort's threads have at once."""
    kernel = calling(on_gpu, tmp_path_factory)
    for tokens in (0, 1, 7, most):
        logits = (torch.randn(tokens, experts, generator=generator) * 3).to(dtype)
        harness.assert_matches(ROUTE, kernel(logits, top_k, normalise), expected(logits, top_k, normalise))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("experts", "groups", "kept", "top_k"), [(160, 8, 3, 6), (12, 4, 2, 6), (8, 8, 2, 1)])
def test_experts_of_the_best_groups(dtype, experts, groups, kept, top_k, generator, kernel):
    """As many as DeepSeek-V2 has, all experts of the groups, groups of one; some experts are not the best of all."""
    for tokens in (1, 7, 300):
        logits = (torch.randn(tokens, experts, generator=generator) * 3).to(dtype)
        actual = kernel(logits, top_k, normalise=False, groups=groups, kept=kept)
        harness.assert_matches(ROUTE, actual, expected(logits, top_k, normalise=False, groups=groups, kept=kept))
    if top_k > 1:
        assert not torch.equal(actual[0], kernel(logits, top_k, normalise=False)[0])


@pytest.mark.parametrize(
    "options",
    [
        {"sigmoid": 1, "groups": 4, "kept": 2, "best": 2, "epsilon": 1e-20},
        {"sigmoid": 1, "epsilon": 0.25},
        {"least": 0.5},
    ],
    ids=["DeepSeek-V3", "sigmoid", "softmax"],
)
def test_chosen_by_sums_of_score_and_bias(options, generator, kernel):
    """They are not those without it; scores are without it."""
    bias = torch.randn(12, generator=generator) * 0.3
    for tokens in (1, 300):
        logits = torch.randn(tokens + 50, 12, generator=generator)
        judged = bias + (logits.sigmoid() if "sigmoid" in options else logits.softmax(-1))
        sums = judged.unflatten(-1, (options.get("groups", 1), -1)).topk(2).values.sum(-1)
        logits = logits[apart(judged) & apart(sums)][:tokens]
        actual = kernel(logits, 3, bias=bias, **options)
        harness.assert_matches(ROUTE, actual, expected(logits, 3, bias=bias, **options))
    assert not torch.equal(actual[0], kernel(logits, 3, **options)[0])


def test_same_groups_as_transformers(generator, kernel):
    """DeepSeek-V2's own router, of random weights."""
    router = group_router()
    router.weight.data.normal_(generator=generator)
    logits, scores, experts = router(torch.randn(60, 32, generator=generator))
    logits, scores, experts = (of_tokens[apart(logits)] for of_tokens in (logits, scores, experts))
    ours = kernel(logits.detach(), 3, normalise=False, groups=4, kept=2)
    experts, order = experts.sort(-1)
    ours_sorted, ours_order = ours[0].long().sort(-1)
    assert torch.equal(ours_sorted, experts)
    torch.testing.assert_close(ours[1].gather(-1, ours_order), scores.detach().gather(-1, order))


def test_groups_by_sums_of_probabilities(generator, kernel):
    """Mistral 4's way; sums of logits are in another order."""
    logits = torch.randn(300, 12, generator=generator) * 3
    probabilities = logits.softmax(-1)

    def chosen(judged):
        best = judged.view(-1, 4, 3).topk(2).values.sum(-1).topk(2).indices
        kept = torch.zeros(300, 4).scatter(1, best, 1).bool().repeat_interleave(3, -1)
        return probabilities.masked_fill(~kept, -1).topk(3).indices

    ours = kernel(logits, 3, groups=4, kept=2, best=2)[0]
    assert torch.equal(ours.long(), chosen(probabilities))
    assert not torch.equal(ours.long(), chosen(logits))


def test_of_equal_logits_the_first_experts(each_kernel):
    logits = torch.tensor([[1.0, 2, 2, 2, 0, 2, 0, 0], [0.0] * 8])
    assert each_kernel(logits)[0].tolist() == [[1, 2], [0, 1]]


def test_same_experts_as_transformers(generator, each_kernel):
    """softmax in float32, torch.topk of it, division by the sum."""
    logits = torch.randn(50, 8, generator=generator)
    scores, experts = logits.softmax(-1).topk(2)
    ours = each_kernel(logits)
    assert torch.equal(ours[0].long(), experts)
    torch.testing.assert_close(ours[1], scores / scores.sum(-1, keepdim=True))


def test_all_tokens_to_one_pair_of_experts(generator, each_kernel):
    logits = torch.randn(9, 8, generator=generator)
    logits[:, [3, 6]] += torch.tensor([200.0, 100.0])
    experts, scores, order, ends = each_kernel(logits)
    assert experts.tolist() == [[3, 6]] * 9
    assert scores.isfinite().all()
    assert order.flatten().tolist() == [*range(0, 18, 2), *range(1, 18, 2)]
    assert ends.flatten().tolist() == [9] * 9 + [18] * 9


def test_nan_stays_in_its_row(generator, each_kernel):
    logits = torch.randn(5, 8, generator=generator)
    clean, dirty = each_kernel(logits), logits.clone()
    dirty[2, 4] = float("nan")
    experts, scores, order, _ = each_kernel(dirty)
    others = torch.arange(5) != 2
    assert torch.equal(experts[others], clean[0][others])
    assert torch.equal(scores[others], clean[1][others])
    assert scores[2].isnan().all()
    assert sorted(order.flatten().tolist()) == list(range(10))


def test_comparison_sees_one_other_logit(generator, each_kernel):
    logits = torch.randn(7, 8, generator=generator)
    wrong = logits.clone()
    wrong[6, wrong[6].argmin()] = wrong[6].max() + 1
    harness.assert_matches(ROUTE, each_kernel(logits), expected(logits))
    with pytest.raises(AssertionError):
        harness.assert_matches(ROUTE, each_kernel(wrong), expected(logits))


def test_more_experts_asked_for_than_there_are():
    spec = harness.op_spec(ROUTE, {"logits": torch.zeros(3, 2)}, {"top_k": 2, "normalise": True})
    attributes = tuple((name, 3 if name == "top_k" else value) for name, value in spec.attributes)
    assert not FAMILY.serves(type(spec)(spec.op, spec.inputs, spec.outputs, attributes), HOST)


@pytest.mark.parametrize("asked", [{"sigmoid": 1}, {"groups": 4, "kept": 2}, {"bias": torch.zeros(12)}])
def test_what_the_gpu_has_no_kernel_for(asked):
    """By name."""
    attributes = {"top_k": 2, "normalise": True, **asked}
    inputs = {"logits": torch.zeros(3, 12)} | ({"bias": attributes.pop("bias")} if "bias" in asked else {})
    with pytest.raises(UnsupportedError, match=f"target rocm has no kernel for route.*{next(iter(asked))}"):
        choose(replace(harness.op_spec(ROUTE, inputs, attributes), options=frozenset(asked) - {"bias"}), GPU)
