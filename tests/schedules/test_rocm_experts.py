"""`expert_linear` and `expert_gate_up_silu` on ROCm, as a CPU emulates them: groups of every size, cut into tiles."""

from __future__ import annotations

from math import prod

import pytest
import torch

from tests.rocm_on_host import needs_opencl
from tests.rocm_on_host.runner import OnHost
from vllm_compile.ops import EXPERT_GATE_UP_SILU, EXPERT_LINEAR
from vllm_compile.schedules.select import choose
from vllm_compile.targets.rocm import WAVE, for_arch

from . import harness
from .test_experts import EXPERTS, TOP_K, routed, sample

pytestmark = needs_opencl
TARGET = for_arch()
OPS = {"linear": EXPERT_LINEAR, "gate_up_silu": EXPERT_GATE_UP_SILU}
K, N = 192, 32  # blocks of columns that three waves share


class Case:
    """An operator, and its kernels, built: all variants, or of the configurations given."""

    def __init__(self, op, folder, configs=None):
        self.op, self.name = OPS[op], op
        inputs = sample(op, torch.Generator(), torch.bfloat16, 1, K, N)
        self.spec = harness.op_spec(self.op, inputs, {})
        choice = choose(self.spec, TARGET)
        self.family = choice.family
        configs = configs or {f"from_{variant.min_tokens}": variant.config for variant in choice.variants}
        self.kernels = list(configs)
        built = {name: choice.family.build(self.spec, config, TARGET) for name, config in configs.items()}
        self.on_host = OnHost(built, TARGET, folder)

    def inputs(self, generator, logits):
        """Of tokens that logits [T, E] route."""
        return sample(self.name, generator, torch.bfloat16, len(logits), K, N) | routed(logits)

    def run(self, inputs, kernel):
        (out,) = harness.poisoned(self.spec, len(inputs["experts"]))
        self.launches = self.on_host.run(kernel, *inputs.values(), out)
        return out

    def assert_matches(self, actual, inputs):
        harness.assert_matches(self.op, (actual,), harness.results(self.op, inputs, {}))


@pytest.fixture(scope="module", params=OPS)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("experts"))


def chosen_by_all(tokens, generator):
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    logits[:, :TOP_K] += 50
    return logits


@pytest.mark.parametrize("tokens", [1, 7, 90])
def test_matches_reference_in_every_batch(tokens, case, generator):
    """With every tile, however many rows are in a group; a token's result has the same bits alone and among others."""
    inputs = case.inputs(generator, torch.randn(tokens, EXPERTS, generator=generator))
    for kernel in case.kernels:
        whole = case.run(inputs, kernel)
        case.assert_matches(whole, inputs)
        experts = inputs["experts"][-1:]
        alone = {"experts": experts, "order": experts.argsort(stable=True).int()}
        ends = torch.arange(1, TOP_K + 1, dtype=torch.int32)[None]
        first = case.run({**inputs, "x": inputs["x"][-1:], **alone, "ends": ends}, kernel)
        assert torch.equal(first, whole[-1:])


@pytest.mark.parametrize("tokens", [16, 65])
def test_all_tokens_to_the_same_experts(tokens, case, generator):
    """Whole tiles, a tile and a row, and experts without a token."""
    inputs = case.inputs(generator, chosen_by_all(tokens, generator))
    for kernel in case.kernels:
        case.assert_matches(case.run(inputs, kernel), inputs)


def test_as_many_windows_as_there_can_be_tiles(case, generator):
    """Places one by one while there are few, so that the experts of a token are read side by side; none for none."""
    for tokens, windows in ((0, []), (1, [TOP_K]), (9, [6])):  # 27 places are at most 5 groups and a cut
        case.run(case.inputs(generator, torch.randn(tokens, EXPERTS, generator=generator)), "from_1")
        assert [launch.grid[0] for launch in case.launches] == windows
    config = case.family.variants(case.spec, TARGET)[0].config
    assert case.family.footprint(case.spec, config, 0, TARGET).blocks == 0


def test_what_tuning_may_choose(case, generator, tmp_path):
    """A configuration of the space, another each run, matches, and is the launch that its footprint says."""
    space = [c for c in case.family.space(case.spec, TARGET) if c["row_tiles"] * c["token_tiles"] * c["steps"] <= 4]
    least = {v.config["token_tiles"]: v.min_tokens for v in case.family.variants(case.spec, TARGET)}
    config = space[int(torch.randint(len(space), (1,), generator=generator))]
    assert case.family.admits(case.spec, config, least[config["token_tiles"]], TARGET)
    assert not case.family.admits(case.spec, config, 0, TARGET)
    other = Case(case.name, tmp_path, {"k": config})
    inputs = case.inputs(generator, torch.randn(30, EXPERTS, generator=generator))
    case.assert_matches(other.run(inputs, "k"), inputs)
    (launch,), footprint = other.launches, case.family.footprint(case.spec, config, 30, TARGET)
    assert (prod(launch.grid), launch.block[0]) == (footprint.blocks, WAVE * footprint.waves), config
    assert footprint.lds_bytes == 2 * other.on_host.resources["k"].lds_bytes, config


def test_experts_that_nobody_chose_are_not_read(case, generator):
    """Their weights may be anything."""
    inputs = case.inputs(generator, chosen_by_all(9, generator))
    before = case.run(inputs, "from_1")
    inputs["weight"][TOP_K:] = float("nan")
    assert torch.equal(case.run(inputs, "from_1"), before)
    inputs["weight"][TOP_K - 1] = float("nan")
    assert case.run(inputs, "from_1").isnan().any()


def test_comparison_sees_one_wrong_weight_and_another_expert(case, generator):
    logits = torch.randn(40, EXPERTS, generator=generator)
    inputs = case.inputs(generator, logits)
    wrong = {**inputs, "weight": inputs["weight"].clone()}
    wrong["weight"][int(inputs["experts"][-1, -1]), -1, -1] += 2
    moved = logits.clone()
    moved[-1] = moved[-1].flip(0)
    for kernel in case.kernels:
        for other in (wrong, inputs | routed(moved)):
            with pytest.raises(AssertionError):
                case.assert_matches(case.run(other, kernel), inputs)
