"""`linear` against its reference: every tile, dtype and instruction level, odd sizes, bias and residual."""

import dataclasses
import subprocess
from collections.abc import Callable

import pytest
import torch
import tvm_ffi

from vllm_compile.ops import LINEAR
from vllm_compile.schedules.build import build_library
from vllm_compile.schedules.cpu.linear import Linear

from . import harness
from .levels import HOST, LEVELS, TARGETS

FAMILY = Linear(packed=False)
levels = pytest.mark.parametrize("target", TARGETS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def sample(generator, dtype, tokens, K, N, bias=False, residual=False):
    inputs, _ = LINEAR.sample(generator, dtype, tokens, K, N)
    return {name: inputs[name] for name in ("x", "weight", *(["bias"] * bias), *(["residual"] * residual))}


def compile_family(family, spec, target, folder, min_tokens=None) -> dict[int, Callable[..., None]]:
    """Least tokens -> kernel of every variant of the family, or of that of `min_tokens` only."""
    configs = {v.min_tokens: v.config for v in family.variants(spec, target) if min_tokens in (None, v.min_tokens)}
    path = folder / "kernels.so"
    build_library({f"k{t}": family.build(spec, config, target) for t, config in configs.items()}, target, path)
    command = ["nm", "-D", "--undefined-only", str(path)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # A weak symbol may stay undefined: the launcher looks before it sets one that no kernel uses.
    symbols = "\n".join(line for line in listed.splitlines() if " U " in line)
    assert "TVMBackend" not in symbols, "the serving process has no TVM runtime"
    assert "exp" not in symbols, "a vector function became calls of the C library"
    module = tvm_ffi.load_module(str(path))
    return {least: module[f"k{least}"] for least in configs}


def assert_every_tile_matches(op, family, spec, target, kernels, sample) -> None:
    """Every kernel within tolerance, a token at a time too, and all to the last bit alike."""
    for tokens in (1, 2, 3, 7, 12, 13, 139):
        inputs = sample(tokens)
        expected = harness.results(op, inputs, {})
        results = [harness.run(k, family, spec, target, inputs) for least, k in kernels.items() if least <= tokens]
        for result in results:
            harness.assert_matches(op, result, expected)
            assert torch.equal(result[0], results[0][0])
        first = {name: t[:1] if name in ("x", "residual") else t for name, t in inputs.items()}
        assert torch.equal(harness.run(kernels[1], family, spec, target, first)[0], results[0][0][:1])


@levels
@dtypes
@pytest.mark.parametrize(
    ("K", "N", "bias", "residual"), [(96, 64, False, False), (131, 83, True, True)], ids=["even", "odd"]
)
def test_matches_reference_in_every_batch(target, dtype, K, N, bias, residual, generator, tmp_path):
    spec = harness.op_spec(LINEAR, sample(generator, dtype, 5, K, N, bias, residual), {})
    kernels = compile_family(FAMILY, spec, target, tmp_path)
    assert_every_tile_matches(
        LINEAR,
        FAMILY,
        spec,
        target,
        kernels,
        lambda tokens: sample(generator, dtype, tokens, K, N, bias, residual),
    )


@pytest.mark.parametrize(
    ("K", "N", "bias", "residual"),
    [(64, 83, True, False), (64, 96, False, True), (64, 5, False, False), (1, 16, False, False)],
)
def test_optional_inputs_and_few_outputs(K, N, bias, residual, generator, tmp_path):
    target = HOST
    inputs = sample(generator, torch.bfloat16, 9, K, N, bias, residual)
    spec = harness.op_spec(LINEAR, inputs, {})
    kernel = compile_family(FAMILY, spec, target, tmp_path, min_tokens=1)[1]
    harness.assert_matches(
        LINEAR, harness.run(kernel, FAMILY, spec, target, inputs), harness.results(LINEAR, inputs, {})
    )


@dtypes
def test_passes_over_a_long_k_keep_the_bits(dtype, generator, tmp_path):
    target = HOST
    inputs = sample(generator, dtype, 300, 1031, 83, bias=True)
    spec = harness.op_spec(LINEAR, inputs, {})
    widest = FAMILY.variants(spec, target)[-1]
    results = []
    for l2_bytes in (1 << 30, 1 << 15):
        sized = dataclasses.replace(target, l2_bytes=l2_bytes)
        kernels = compile_family(FAMILY, spec, sized, tmp_path, min_tokens=widest.min_tokens)
        results.append(harness.run(kernels[widest.min_tokens], FAMILY, spec, sized, inputs))
        (tmp_path / "kernels.so").unlink()
    harness.assert_matches(LINEAR, results[1], harness.results(LINEAR, inputs, {}))
    assert torch.equal(results[0][0], results[1][0])


def test_every_call_has_a_tile_that_fits_it():
    spec = harness.op_spec(LINEAR, sample(torch.Generator(), torch.bfloat16, 5, 96, 64), {})
    for target in LEVELS.values():
        variants = FAMILY.variants(spec, target)
        assert [v.min_tokens for v in variants] == sorted({v.min_tokens for v in variants})
        assert variants[0].min_tokens == 1
        assert all(v.config["rows"] <= v.min_tokens for v in variants)
        assert all(v.config in FAMILY.space(spec, target) for v in variants)


@pytest.fixture
def compiled(generator, tmp_path):
    target = HOST
    inputs = sample(generator, torch.bfloat16, 9, 96, 80, bias=True, residual=True)
    spec = harness.op_spec(LINEAR, inputs, {})
    kernel = compile_family(FAMILY, spec, target, tmp_path, min_tokens=4)[4]
    return inputs, lambda given: harness.run(kernel, FAMILY, spec, target, given)


def test_no_tokens_and_foreign_dtypes(compiled):
    inputs, call = compiled
    none = {name: t[:0] if name in ("x", "residual") else t for name, t in inputs.items()}
    assert call(none)[0].shape == (0, 80)
    mixed = harness.op_spec(LINEAR, {**inputs, "residual": inputs["residual"].float()}, {})
    assert not FAMILY.serves(mixed, HOST)


@pytest.mark.parametrize("broken", ["x", "weight", "bias", "residual"])
def test_comparison_sees_one_wrong_input(compiled, broken):
    inputs, call = compiled
    expected = harness.results(LINEAR, inputs, {})
    harness.assert_matches(LINEAR, call(inputs), expected)
    changed = inputs[broken].clone()
    changed.view(-1)[-1] += 2
    with pytest.raises(AssertionError):
        harness.assert_matches(LINEAR, call({**inputs, broken: changed}), expected)


def test_nan_stays_in_its_row(compiled):
    inputs, call = compiled
    clean = call(inputs)[0]
    x = inputs["x"].clone()
    x[4, 3] = float("nan")
    dirty = call({**inputs, "x": x})[0]
    assert dirty[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(dirty[others], clean[others])


def test_unaligned_tensors(compiled):
    inputs, call = compiled
    shifted = {}
    for name, tensor in inputs.items():
        base = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        shifted[name] = base[1:].view(tensor.shape).copy_(tensor)
    assert torch.equal(call(shifted)[0], call(inputs)[0])
