"""Lossless panels: every bit is stored, and kernels that unpack them give what plain weights give, to the last bit."""

import dataclasses

import pytest
import torch
import tvm_ffi

from tests.test_lossless import FITTING, all_denormal, bits, exponents_everywhere, gaussian, special
from vllm_compile import lossless
from vllm_compile.ops import GATE_UP_SILU, LINEAR
from vllm_compile.schedules.build import build_library
from vllm_compile.schedules.cpu.gate_up import GateUpSilu
from vllm_compile.schedules.cpu.linear import Linear
from vllm_compile.schedules.lossless_panels import LosslessPanels

from . import harness
from .levels import HOST, TARGETS

LAYOUTS = [LosslessPanels(lanes, gated) for lanes in (8, 16) for gated in (False, True)]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
TOKENS = (1, 2, 5, 12, 139)


def restored(packed, layout, N, K):
    """The weight by the letter of the layout's docstring, and how many side entries there are."""
    bases_at, first_at, side_at, _ = layout.offsets(N, K)
    words, lanes = packed.view(torch.int32), layout.lanes
    panels, groups = N // lanes, K // 8
    joined = words[: panels * groups * 3 * lanes].view(panels, groups, 3, lanes)
    # word, panel, group, lane -> panel, lane, group, word
    codes = lossless.part(joined.permute(2, 0, 1, 3)).permute(1, 3, 2, 0).contiguous().view(torch.int16)
    rows = codes.view(panels, lanes, K)
    bases = words[bases_at : bases_at + N].view(torch.int16).view(panels, lanes, 2)[..., :1]
    rows = torch.where((rows & lossless.MAGNITUDE) != 0, rows + bases, rows)
    first = words[first_at : first_at + panels + 1].tolist()
    side = words[side_at:].view(-1, 2)
    for panel in range(panels):
        places = side[first[panel] : first[panel + 1], 0].tolist()
        assert places == sorted(places)
        for place, value in zip(places, side[first[panel] : first[panel + 1], 1].tolist(), strict=True):
            assert rows[panel, place % lanes, place // lanes] & lossless.MAGNITUDE == 0
            rows[panel, place % lanes, place // lanes] = value >> 16
    if layout.gated:
        rows = torch.cat((rows[::2], rows[1::2]))
    return rows.reshape(N, K).view(torch.bfloat16), first[-1]


def assert_restored(weight, layout):
    packed = layout.pack(weight)
    assert packed.dtype == torch.uint8
    assert tuple(packed.shape) == layout.shape(tuple(weight.shape))
    found, listed = restored(packed, layout, *weight.shape)
    assert torch.equal(found.view(torch.int16), weight.view(torch.int16))
    return packed, listed


@layouts
@pytest.mark.parametrize(("N", "K"), [(32, 8), (64, 200), (2048, 1024)])
def test_gaussian(layout, N, K, generator):
    packed, listed = assert_restored(gaussian(generator, N, K), layout)
    assert listed < N * K / 2000 + 10
    if N == 2048:
        assert packed.nbytes * 8 / (N * K) < 12.2


@layouts
@pytest.mark.parametrize("name", [name for name in FITTING if name != "largest"])
def test_special_weights_are_restored(layout, name, generator):
    assert_restored(special(generator, name), layout)


@layouts
@pytest.mark.parametrize("make", [exponents_everywhere, all_denormal])
def test_what_does_not_fit_is_refused(layout, make, generator):
    with pytest.raises(ValueError, match="outside the windows"):
        layout.pack(make(generator))


@layouts
def test_restoring_sees_one_wrong_byte(layout, generator):
    weight = gaussian(generator, 64, 256)
    weight[0].clamp_(min=0.01)  # the byte is of one that is not listed, as one in thousands is
    weight[:, 9] = 1e-30
    packed, _ = assert_restored(weight, layout)
    bases_at, _, side_at, _ = layout.offsets(64, 256)
    for place in (0, 4 * bases_at, 4 * side_at + 7):
        wrong = packed.clone()
        wrong[place] ^= 1
        assert not torch.equal(restored(wrong, layout, 64, 256)[0].view(torch.int16), weight.view(torch.int16))


def awkward(weight, most):
    """Weights of each kind that a kernel restores in its own way, up to `most`; finite, for they are summed."""
    weight = weight.clone()
    tiny = weight.abs() < weight.abs().amax(dim=1, keepdim=True) / 2**13
    weight[tiny] = 0.01  # none is listed but the following
    weight[0] = 0
    weight[1, ::3] = -0.0
    weight[2, 5:20] = bits(*range(1, 16))  # denormals
    weight[3, -1] = most
    weight[::5, 7] = 1e-30
    weight[-1, :40] = -1e-25
    return weight


def sample(op, generator, tokens, K, N):
    inputs, _ = op.sample(generator, torch.bfloat16, tokens, K, N)
    most = 1e3 if op is GATE_UP_SILU else 1e20  # what a gate is multiplied with may be all rounding
    inputs["weight"] = awkward(inputs["weight"], most)
    return inputs


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("op", "family"), [(LINEAR, Linear), (GATE_UP_SILU, GateUpSilu)], ids=["linear", "gate_up"])
@pytest.mark.parametrize("K", [64, 1000])
def test_kernels_give_what_plain_weights_give(op, family, target, K, generator, tmp_path):
    draw = {tokens: sample(op, generator, tokens, K, 96) for tokens in TOKENS}
    spec = harness.op_spec(op, draw[5], {})
    plain, packed = family(packed=False), family(packed=True)
    variants = packed.variants(spec, target)
    clean = torch.arange(96) % 5 == 1  # rows of either half without a weight that is listed
    configs = {v.min_tokens: v.config for v in (variants[0], variants[len(variants) // 2], variants[-1])}
    prim_funcs = {f"k{least}": packed.build(spec, config, target) for least, config in configs.items()}
    prim_funcs["plain"] = plain.build(spec, plain.variants(spec, target)[0].config, target)
    build_library(prim_funcs, target, tmp_path / "k.so")
    kernels = tvm_ffi.load_module(str(tmp_path / "k.so"))
    for tokens, inputs in draw.items():
        expected = harness.run(kernels["plain"], plain, spec, target, inputs)[0]
        harness.assert_matches(op, (expected,), harness.results(op, inputs, {}))
        ours = [harness.run(kernels[f"k{m}"], packed, spec, target, inputs)[0] for m in configs if m <= tokens]
        for result in ours:
            harness.assert_matches(op, (result,), (expected,))
            # What is listed is added last, which may round another way, but in all batches alike.
            assert torch.equal(result[:, clean], expected[:, clean])
            assert torch.equal(result.view(torch.int16), ours[0].view(torch.int16))
        first = {name: t[:1] if name in ("x", "residual") else t for name, t in inputs.items()}
        assert torch.equal(harness.run(kernels["k1"], packed, spec, target, first)[0], ours[0][:1])


@pytest.fixture
def compiled(generator, tmp_path):
    family, inputs = Linear(packed=True), sample(LINEAR, generator, 3, 256, 96)
    spec = harness.op_spec(LINEAR, inputs, {})
    kernel = harness.compile_variants(family, spec, HOST, tmp_path)[1]
    arguments = family.layouts(spec, HOST)["weight"].pack(inputs["weight"])

    def call(packed):
        others = [tensor for name, tensor in inputs.items() if name not in ("x", "weight")]
        out = torch.full((3, 96), float("nan"), dtype=torch.bfloat16)
        kernel(inputs["x"], packed, *others, out)
        return out

    return call, arguments


def test_kernels_read_codes_bases_and_side_list(compiled):
    call, packed = compiled
    right = call(packed)
    assert right.isfinite().all()
    bases_at, first_at, side_at, _ = LosslessPanels(HOST.vector_lanes).offsets(96, 256)
    words = {
        "codes": 3 * HOST.vector_lanes,
        "a base": bases_at + 5,
        "a side entry": side_at + 1,
    }  # a float32's upper half
    for what, word in words.items():
        changed = packed.clone()
        # Signs and exponents of one word for each row of the panel; of one row's base, of one weight.
        end = word + (HOST.vector_lanes if what == "codes" else 1)
        changed[4 * word + 1 : 4 * end : 2] ^= 0xC0
        assert not torch.equal(call(changed), right), what
    changed = packed.clone()
    changed[4 * first_at : 4 * side_at] = 0  # no side entries
    assert not torch.equal(call(changed), right)


def test_every_configuration_of_the_space(generator, tmp_path):
    """Those that are not a default, for one tile and for three, the last over the one before it."""
    family, draw = Linear(packed=True), [sample(LINEAR, generator, tokens, 1000, 96) for tokens in (4, 11)]
    spec = harness.op_spec(LINEAR, draw[0], {})
    configs = [c for c in family.space(spec, HOST) if c["rows"] == 4 and c["panels"] in (1, 3)]
    assert {c["many"] for c in configs} == {False, True}
    build_library({f"k{i}": family.build(spec, c, HOST) for i, c in enumerate(configs)}, HOST, tmp_path / "k.so")
    module = tvm_ffi.load_module(str(tmp_path / "k.so"))
    for inputs in draw:
        expected = harness.results(LINEAR, inputs, {})
        for i in range(len(configs)):
            harness.assert_matches(LINEAR, harness.run(module[f"k{i}"], family, spec, HOST, inputs), expected)


@pytest.mark.parametrize(("op", "family"), [(LINEAR, Linear), (GATE_UP_SILU, GateUpSilu)], ids=["linear", "gate_up"])
def test_passes_over_a_long_k_keep_the_bits(op, family, generator, tmp_path):
    """Of words that the first tile of rows keeps for the others, too."""
    family, inputs = family(packed=True), sample(op, generator, 150, 2048, 96)
    spec = harness.op_spec(op, inputs, {})
    results = []
    for l2_bytes in (1 << 30, 1 << 15):
        sized = dataclasses.replace(HOST, l2_bytes=l2_bytes)
        config = family.variants(spec, sized)[-1].config
        assert config["many"]
        build_library({"k": family.build(spec, config, sized)}, sized, tmp_path / f"{l2_bytes}.so")
        kernel = tvm_ffi.load_module(str(tmp_path / f"{l2_bytes}.so"))["k"]
        results.append(harness.run(kernel, family, spec, sized, inputs)[0])
    assert config["words"] < 1024
    harness.assert_matches(op, results[1:], harness.results(op, inputs, {}))
    assert torch.equal(*results)


@pytest.mark.parametrize(("N", "K", "dtype"), [(90, 64, "bfloat16"), (96, 60, "bfloat16"), (96, 64, "float32")])
def test_other_weights_are_left_plain(N, K, dtype, generator):
    inputs, _ = LINEAR.sample(generator, getattr(torch, dtype), 3, K, N)
    spec = harness.op_spec(LINEAR, inputs, {})
    assert not Linear(packed=True).serves(spec, HOST)
    assert Linear(packed=False).serves(spec, HOST)
