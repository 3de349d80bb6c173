"""ROCm kernels against the references: their host code launches them over a fake HIP, a CPU runs their schedule."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from tests.rocm_on_host import needs_opencl
from tests.rocm_on_host.runner import OnHost
from vllm_compile import lossless
from vllm_compile.ops import (
    ADD_RMS_NORM,
    EMBEDDING,
    GATE_UP_SILU,
    LINEAR,
    PAGED_ATTENTION,
    QKV_ROPE_CACHE,
    RMS_NORM,
    SILU_MUL,
)
from vllm_compile.schedules.rocm.linear import GateUpSilu, Linear
from vllm_compile.schedules.select import choose
from vllm_compile.targets.rocm import WAVE, for_arch

from . import harness

pytestmark = needs_opencl
TARGET = for_arch()
# op, sizes of its sample, what a negative control changes
CASES = {
    "rms_norm": (RMS_NORM, {"tokens": 3, "width": 4096}, "x"),
    "rms_norm of less than a wave": (RMS_NORM, {"tokens": 3, "width": 104}, "weight"),
    "rms_norm of waves not full": (RMS_NORM, {"tokens": 2, "width": 2048 + 520}, "x"),
    "add_rms_norm": (ADD_RMS_NORM, {"tokens": 5, "width": 2048}, "residual"),
    "add_rms_norm of the widest row": (ADD_RMS_NORM, {"tokens": 2, "width": 16384}, "x"),
    "embedding": (EMBEDDING, {"tokens": 9, "rows": 40, "width": 4096}, "table"),
    "embedding of less than a wave": (EMBEDDING, {"tokens": 9, "rows": 40, "width": 72}, "table"),
    "silu_mul": (SILU_MUL, {"tokens": 3, "intermediate": 14336}, "x"),
    "silu_mul of less than a wave": (SILU_MUL, {"tokens": 3, "intermediate": 24}, "x"),
    "linear": (LINEAR, {"tokens": 19, "K": 512, "N": 32}, "x"),
    "linear of blocks that three waves share": (LINEAR, {"tokens": 5, "K": 192, "N": 48}, "residual"),
    "linear of more tokens than a vendor leaves": (LINEAR, {"tokens": 83, "K": 128, "N": 16}, "bias"),
    "linear of half a tile": (LINEAR, {"tokens": 5, "K": 256, "N": 8}, "bias"),
    "linear of a last tile not full": (LINEAR, {"tokens": 3, "K": 64, "N": 36}, "residual"),
    "gate_up_silu": (GATE_UP_SILU, {"tokens": 16, "K": 128, "intermediate": 32}, "weight"),
    "lossless linear": (LINEAR, {"tokens": 19, "K": 192, "N": 96}, "residual"),
    "lossless gate_up_silu": (GATE_UP_SILU, {"tokens": 35, "K": 256, "intermediate": 48}, "weight"),
    "paged_attention": (PAGED_ATTENTION, {"head_dim": 64}, "kv"),
    "paged_attention of one query a head": (
        PAGED_ATTENTION,
        {"lengths": ((1, 70), (1, 1)), "num_heads": 2, "num_kv_heads": 2, "head_dim": 128, "block_size": 32},
        "kv",
    ),
    "paged_attention of wide heads": (
        PAGED_ATTENTION,
        {"lengths": ((1, 35), (0, 0), (3, 20)), "num_heads": 16, "num_kv_heads": 1, "head_dim": 256},
        "kv",
    ),
    "rope_cache": (QKV_ROPE_CACHE, {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}, "cos"),
    "rope_cache of odd sizes": (
        QKV_ROPE_CACHE,
        {"tokens": 33, "num_heads": 3, "num_kv_heads": 3, "head_dim": 80, "block_size": 7},
        "qkv",
    ),
}
# Compute units of the chip, where they decide into how many parts a cache is split.
UNITS = {"paged_attention": 32, "paged_attention of one query a head": 1, "paged_attention of wide heads": 10}
PARTS = {"paged_attention": 2, "paged_attention of one query a head": 1, "paged_attention of wide heads": 5}
# The model of the chip would have weights of these sizes plain.
LOSSLESS = {"lossless linear": Linear(packed=True), "lossless gate_up_silu": GateUpSilu(packed=True)}


class Case:
    """One call of an operator, its kernel built."""

    def __init__(self, name, generator, folder):
        self.op, sizes, self.changed = CASES[name]
        self.inputs, self.attributes = self.op.sample(generator, torch.bfloat16, **sizes)
        self.spec = harness.op_spec(self.op, self.inputs, self.attributes)
        target = replace(TARGET, compute_units=UNITS.get(name, TARGET.compute_units))
        family = LOSSLESS.get(name) or choose(self.spec, target).family
        self.layouts = family.layouts(self.spec, target)
        self.kernels = {
            f"from_{variant.min_tokens}": family.build(self.spec, variant.config, target)
            for variant in family.variants(self.spec, target)
        }
        self.on_host = OnHost(self.kernels, target, folder)

    def run(self, inputs, kernel="from_1"):
        """What a kernel writes into poisoned outputs, and what it updates."""
        given = {name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in inputs.items()}
        tokens = len(next(iter(inputs.values())))
        outputs = [torch.full(out.sizes(tokens), float("nan"), dtype=torch.bfloat16) for out in self.spec.outputs]
        stored = {**given, **{name: layout.pack(given[name]) for name, layout in self.layouts.items()}}
        self.launches = self.on_host.run(kernel, *stored.values(), *outputs)
        return (*outputs, *(given[name] for name in self.op.updates))

    def expected(self, inputs):
        given = {name: tensor.clone(memory_format=torch.preserve_format) for name, tensor in inputs.items()}
        return (*harness.results(self.op, given, self.attributes), *(given[name] for name in self.op.updates))


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name, generator, tmp_path):
    case = Case(name, generator, tmp_path)
    expected = case.expected(case.inputs)
    for kernel in case.kernels:
        actual = case.run(case.inputs, kernel)
        harness.assert_matches(case.op, actual, expected)
    if name in PARTS:
        assert [launch.grid[2] for launch in case.launches] == [PARTS[name], 1][: len(case.launches)]
        assert len(case.launches) == 1 + (PARTS[name] > 1)
    if case.op in (EMBEDDING, QKV_ROPE_CACHE):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))
    elif (
        case.op is not PAGED_ATTENTION
    ):  # an exponential, a sum in another order: a value moves across a rounding boundary once in hundreds
        for ours, theirs in zip(actual, expected, strict=True):
            assert (ours != theirs).sum() <= max(1, ours.numel() // 100)
    changed = case.inputs[case.changed].clone()
    # Of a table and a cache perhaps not all rows are read; of logits all, changed by as much, mean the same.
    changed[0 if case.changed in ("kv", "table") else len(changed) // 2 :] += 1
    with pytest.raises(AssertionError):
        harness.assert_matches(case.op, case.run({**case.inputs, case.changed: changed}), expected)


@pytest.mark.parametrize("name", [name for name, (op, *_) in CASES.items() if op is LINEAR])
def test_residual_may_lie_where_the_sum_will(name, generator, tmp_path):
    case = Case(name, generator, tmp_path)
    if "residual" not in case.inputs:
        pytest.skip("this case adds nothing")
    stored = {**case.inputs, **{weight: layout.pack(case.inputs[weight]) for weight, layout in case.layouts.items()}}
    for kernel in case.kernels:
        (apart,) = case.run(case.inputs, kernel)
        sums = case.inputs["residual"].clone()
        case.on_host.run(kernel, *{**stored, "residual": sums}.values(), sums)
        assert torch.equal(sums, apart)


def test_lossless_weights_are_restored_bit_for_bit(generator, tmp_path):
    """Rows of an identity times the weight, of numbers of all sizes: each result is one weight."""
    N, K = 64, 128
    weight = torch.randn(N, K, generator=generator).bfloat16()
    far = torch.randint(-120, 120, (N, K), generator=generator).float()
    listed = torch.rand(N, K, generator=generator) < 2**-7
    weight = torch.where(listed, weight.float() * 2**far, weight.float()).bfloat16()
    weight[0, :3] = torch.tensor([0.0, -0.0, 1e-39])
    inputs = {"x": torch.eye(K, dtype=torch.bfloat16), "weight": weight}
    spec, family = harness.op_spec(LINEAR, inputs, {}), Linear(packed=True)
    kernels = {f"from_{v.min_tokens}": family.build(spec, v.config, TARGET) for v in family.variants(spec, TARGET)}
    on_host, packed = OnHost(kernels, TARGET, tmp_path), lossless.pack(weight)
    for kernel in kernels:
        out = torch.full((K, N), float("nan"), dtype=torch.bfloat16)
        on_host.run(kernel, inputs["x"], packed, out)
        assert torch.equal(out.T, weight)
    # Bytes of the codes: of a weight that is listed, as one in a hundred is, a code may not show beside its entry.
    places = torch.randperm(N * K * 3 // 2, generator=generator)[:8]
    packed[places] = packed[places] ^ 1
    on_host.run("from_1", inputs["x"], packed, out)
    assert not torch.equal(out.T, weight)


def test_lossless_weights_of_values_of_any_size(generator, tmp_path):
    """Up to the largest: x is not scaled, the weights are."""
    sizes = 2.0 ** torch.tensor([[-60], [-30], [0], [64], [100], [120]])
    sample, _ = LINEAR.sample(generator, torch.bfloat16, tokens=6, K=128, N=64)
    inputs = {"x": (sample["x"] * sizes).bfloat16(), "weight": sample["weight"]}
    spec, family = harness.op_spec(LINEAR, inputs, {}), Linear(packed=True)
    on_host = OnHost({"k": family.build(spec, family.variants(spec, TARGET)[0].config, TARGET)}, TARGET, tmp_path)
    (out,) = harness.poisoned(spec, 6)
    on_host.run("k", inputs["x"], lossless.pack(inputs["weight"]), out)
    exact = inputs["x"].double() @ inputs["weight"].double().T
    error = (out.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < 2**-8  # rounded to bfloat16 once
    assert (out.roll(1, 1).double() - exact).norm(dim=1).div(exact.norm(dim=1)).min() > 2**-8


MOST_UNROLLED = 8  # tiles of products in a loop's body: PoCL takes many seconds to compile the largest
MOST_STEPS = 8  # that the model of the chip likes best: the first that is tried has them
# op, sizes of its sample, configurations that are tried: others each run
SPACES = {
    "linear": (LINEAR, {"tokens": 19, "K": 512, "N": 64}, 2),
    "gate_up_silu": (GATE_UP_SILU, {"tokens": 37, "K": 512, "intermediate": 64}, 2),
    "lossless gate_up_silu": (GATE_UP_SILU, {"tokens": 21, "K": 128, "intermediate": 32}, 1),
    "paged_attention": (PAGED_ATTENTION, {"head_dim": 64}, 1),
}


@pytest.mark.parametrize("name", SPACES)
def test_what_tuning_may_choose(name, generator, tmp_path):
    """Any configuration of a family's space matches the reference, and is the launch that its footprint says."""
    target = replace(TARGET, compute_units=UNITS.get(name, TARGET.compute_units))
    op, sizes, most = SPACES[name]
    inputs, attributes = op.sample(generator, torch.bfloat16, **sizes)
    spec = harness.op_spec(op, inputs, attributes)
    family = LOSSLESS.get(name) or choose(spec, target).family
    stored = {**inputs, **{n: layout.pack(inputs[n]) for n, layout in family.layouts(spec, target).items()}}
    space = family.space(spec, target)
    others = [c for c in space if c not in [v.config for v in family.variants(spec, target)]]
    small = [config for config in others if prod(config.values()) <= MOST_UNROLLED * config["waves"]]
    drawn = [small[i] for i in torch.randperm(len(small), generator=generator)]
    chosen = sorted(drawn, key=lambda config: config.get("steps") != MOST_STEPS)[:most]
    assert all(any(family.admits(spec, c, least, target) for least in (1, 17, 33)) for c in space)
    on_host = OnHost({f"k{i}": family.build(spec, c, target) for i, c in enumerate(chosen)}, target, tmp_path)
    expected = harness.results(op, inputs, attributes)
    tokens = len(next(iter(inputs.values())))
    for i, config in enumerate(chosen):
        outputs = [torch.full(out.sizes(tokens), float("nan"), dtype=torch.bfloat16) for out in spec.outputs]
        launch, *after = on_host.run(f"k{i}", *stored.values(), *outputs)
        harness.assert_matches(op, outputs, expected)
        with pytest.raises(AssertionError):
            harness.assert_matches(op, [out.roll(1, -1) for out in outputs], expected)
        footprint, resources = family.footprint(spec, config, tokens, target), on_host.resources[f"k{i}"]
        assert (prod(launch.grid), launch.block[0]) == (footprint.blocks, WAVE * footprint.waves), config
        assert len(after) == (footprint.rounds_after > 0), config
        assert footprint.lds_bytes == 2 * resources.lds_bytes, config
        assert resources.spilled == 0, config


def test_more_parts_than_are_added_up_at_once(generator, tmp_path):
    """Of 80 the second launch adds up 64, then the rest, which counts."""
    target = replace(TARGET, compute_units=40)
    sizes = {"lengths": ((1, 80 * 16 - 3),), "num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "block_size": 16}
    inputs, attributes = PAGED_ATTENTION.sample(generator, torch.bfloat16, **sizes)
    spec = harness.op_spec(PAGED_ATTENTION, inputs, attributes)
    kernel = choose(spec, target).family.build(spec, {"waves": 1, "blocks": 2}, target)
    on_host = OnHost({"k": kernel}, target, tmp_path)

    def run(given):
        (out,) = harness.poisoned(spec, 1)
        assert [launch.grid[2] for launch in on_host.run("k", *given.values(), out)] == [80, 1]
        return out

    expected = harness.results(PAGED_ATTENTION, inputs, attributes)
    harness.assert_matches(PAGED_ATTENTION, [run(inputs)], expected)
    last = {**inputs, "kv": inputs["kv"].clone()}
    last["kv"][inputs["block_table"][0, 70:].long()] += 1
    with pytest.raises(AssertionError):
        harness.assert_matches(PAGED_ATTENTION, [run(last)], expected)


@pytest.mark.parametrize("name", ["rms_norm", "silu_mul", "embedding", "rope_cache"])
def test_a_row_does_not_depend_on_the_batch_and_no_tokens_launch_nothing(name, generator, tmp_path):
    case = Case(name, generator, tmp_path)
    per_token = {n for n, tensor in case.spec.inputs if tensor.shape[0] == harness.T}

    def rows(start, end):
        return {n: tensor[start:end] if n in per_token else tensor for n, tensor in case.inputs.items()}

    whole, alone = case.run(case.inputs), case.run(rows(1, 2))
    assert torch.equal(alone[0][0], whole[0][1])
    (launch,) = case.launches
    assert launch.grid[0] == 1
    case.run(rows(0, 0))
    assert not case.launches


@pytest.mark.parametrize("layout", ["token major", "every other block"])
def test_cache_with_any_outer_strides(layout, generator, tmp_path):
    case = Case("rope_cache of odd sizes", generator, tmp_path)
    kv = case.inputs["kv"]
    if layout == "token major":
        strided = kv.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        strided = kv.new_zeros(2 * len(kv), *kv.shape[1:])[1::2].copy_(kv)
    assert not strided.is_contiguous()
    expected = case.expected(case.inputs)
    q = torch.full_like(expected[0], float("nan"))
    case.on_host.run("from_1", *({**case.inputs, "kv": strided}).values(), q)
    assert torch.equal(q, expected[0])
    assert torch.equal(strided, expected[1])


def test_what_no_family_serves_is_named(generator):
    inputs, attributes = RMS_NORM.sample(generator, torch.float32, width=64)
    with pytest.raises(Exception, match=r"target rocm has no kernel for rms_norm\(x .* float32"):
        choose(harness.op_spec(RMS_NORM, inputs, attributes), TARGET)
