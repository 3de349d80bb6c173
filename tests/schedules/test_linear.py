"""`linear` against its reference: every variant, dtype and instruction level, odd sizes, bias and residual."""

import subprocess

import pytest
import torch

from vllm_compile.ops import LINEAR
from vllm_compile.schedules.build import build_library
from vllm_compile.schedules.cpu.linear import Linear
from vllm_compile.targets import cpu

from . import harness

LEVELS = {
    "avx2": cpu.for_features(cpu.AVX2),
    "avx512": cpu.for_features(cpu.AVX2 | cpu.AVX512),
    "avx512_bf16": cpu.for_features(cpu.AVX2 | cpu.AVX512 | {cpu.AVX512_BF16}),
}
FAMILY = Linear()
levels = pytest.mark.parametrize("target", LEVELS.values(), ids=LEVELS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def sample(generator, dtype, tokens, K, N, bias=False, residual=False):
    inputs, _ = LINEAR.sample(generator, dtype, tokens, K, N)
    return {name: inputs[name] for name in ("x", "weight", *(["bias"] * bias), *(["residual"] * residual))}


def serving(kernels, tokens):
    """The variants that may serve a call of `tokens` tokens."""
    return [kernel for min_tokens, kernel in kernels.items() if min_tokens <= tokens]


@levels
@dtypes
@pytest.mark.parametrize(
    ("K", "N", "bias", "residual"), [(96, 64, False, False), (131, 83, True, True), (64, 96, False, True), (33, 37, True, False)]
)
def test_matches_reference(target, dtype, K, N, bias, residual, generator, tmp_path):
    spec = harness.op_spec(LINEAR, sample(generator, dtype, 5, K, N, bias, residual), {})
    kernels = harness.compile_variants(FAMILY, spec, target, tmp_path)
    for tokens in (1, 2, 3, 7, 12, 13, 29):
        inputs = sample(generator, dtype, tokens, K, N, bias, residual)
        expected = harness.results(LINEAR, inputs, {})
        for kernel in serving(kernels, tokens):
            harness.assert_matches(LINEAR, harness.run(kernel, FAMILY, spec, target, inputs), expected)


@levels
@dtypes
def test_rows_do_not_depend_on_the_batch(target, dtype, generator, tmp_path):
    inputs = sample(generator, dtype, 29, 515, 83, bias=True, residual=True)
    spec = harness.op_spec(LINEAR, inputs, {})
    kernels = harness.compile_variants(FAMILY, spec, target, tmp_path)
    results = {}
    for tokens in (1, 5, 12, 29):
        part = {name: t[:tokens] if name in ("x", "residual") else t for name, t in inputs.items()}
        for kernel in serving(kernels, tokens):
            results[tokens, kernel] = harness.run(kernel, FAMILY, spec, target, part)[0]
    whole = results[29, kernels[1]]
    for (tokens, _), result in results.items():
        assert torch.equal(result, whole[:tokens])


@pytest.fixture
def compiled(generator, tmp_path):
    target = LEVELS["avx512_bf16"]
    inputs = sample(generator, torch.bfloat16, 9, 96, 80, bias=True, residual=True)
    spec = harness.op_spec(LINEAR, inputs, {})
    kernel = harness.compile_variants(FAMILY, spec, target, tmp_path)[1]
    return inputs, lambda given: harness.run(kernel, FAMILY, spec, target, given)


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


@levels
@dtypes
def test_library_needs_no_tvm_runtime(target, dtype, generator, tmp_path):
    spec = harness.op_spec(LINEAR, sample(generator, dtype, 5, 515, 83, True, True), {})
    kernels = {f"k{v.min_tokens}": FAMILY.build(spec, v.config, target) for v in FAMILY.variants(spec, target)}
    build_library(kernels, target, tmp_path / "k.so")
    command = ["nm", "-D", "--undefined-only", str(tmp_path / "k.so")]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "TVMBackend" not in symbols
    assert "exp" not in symbols
