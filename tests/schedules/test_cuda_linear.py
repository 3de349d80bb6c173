"""CUDA's `linear` and `gate_up_silu`: machine code without a GPU; with one, numbers, graphs and streams.

Building needs nvcc, the second half a Hopper GPU; both are skipped where they are missing.
"""

import re
import shutil
import subprocess
import sys

import pytest
import torch
import tvm_ffi

from benchmarks import kernels_cuda_linear
from vllm_compile import lossless
from vllm_compile.errors import TargetError
from vllm_compile.ops import GATE_UP_SILU, LINEAR
from vllm_compile.schedules.cuda import build as cuda_build
from vllm_compile.schedules.cuda import matmul
from vllm_compile.schedules.cuda.gate_up import GateUpSilu
from vllm_compile.schedules.cuda.linear import Linear
from vllm_compile.targets import cuda

from . import harness
from .sass import loads_before_waiting, sass_of

TARGET = cuda.for_chip()
N, K = 512, 576  # 9 blocks of 64: no multiple of the warps
FORMS = {
    "linear": (LINEAR, Linear, ()),
    "linear_bias_residual": (LINEAR, Linear, ("bias", "residual")),
    "gate_up_silu": (GATE_UP_SILU, GateUpSilu, ()),
}
KINDS = {"plain": False, "lossless": True}
# Variants besides the default ones of so narrow a weight.
MORE = {
    98: {"tokens": 32, "row_groups": 1, "k_groups": 2, "cluster": 4, "blocks": 1, "stages": 3, "prefetch": 3},
    99: {"tokens": 64, "row_groups": 1, "k_groups": 2, "cluster": 1, "blocks": 1, "stages": 2, "prefetch": 3},
    100: {"tokens": 16, "row_groups": 2, "k_groups": 1, "cluster": 1, "blocks": 2, "stages": 4, "prefetch": 3},
    101: {"tokens": 64, "row_groups": 4, "k_groups": 1, "cluster": 2, "blocks": 1, "stages": 3, "prefetch": 3},
    102: {"tokens": 64, "row_groups": 2, "k_groups": 1, "cluster": 4, "blocks": 2, "stages": 3, "prefetch": 3},
}
# What apache-tvm-ffi has had since 0.1.10, which vLLM pins.
ABI = {"TVMFFIBacktrace", "TVMFFIEnvGetStream", "TVMFFIErrorSetRaised", "TVMFFIErrorSetRaisedFromCStrParts"}

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != cuda.CAPABILITY, reason="needs a Hopper GPU"
)


def sample(form, generator, tokens):
    op, _, optional = FORMS[form]
    width = {"intermediate": N // 2} if op is GATE_UP_SILU else {"N": N}
    inputs, _ = op.sample(generator, torch.bfloat16, tokens, K, **width)
    return {name: inputs[name] for name in ("x", "weight", *optional)}


def spec_of(form):
    return harness.op_spec(FORMS[form][0], sample(form, torch.Generator(), 5), {})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(library, resources by symbol, variants by form and kind: configurations by number)."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    kernels, variants = {}, {}
    for form, (_, family_of, _) in FORMS.items():
        spec = spec_of(form)
        for kind, packed in KINDS.items():
            family = family_of(packed)
            assert family.serves(spec, TARGET)
            configs = {v.min_tokens: v.config for v in family.variants(spec, TARGET)}
            configs |= {number: {"kind": "wide", "lossless": packed, **config} for number, config in MORE.items()}
            variants[form, kind] = configs
            for number, config in configs.items():
                kernels[f"{form}_{kind}_{number}"] = family.build(spec, config, TARGET)
    path = tmp_path_factory.mktemp("cuda") / "kernels.so"
    return path, cuda_build.build_library(kernels, TARGET, path), variants


@pytest.fixture(scope="module")
def machine_code(built):
    return sass_of(built[0])


def test_nothing_is_spilled(built):
    _, resources, variants = built
    assert len(resources) == sum(map(len, variants.values()))
    for symbol, used in resources.items():
        assert used.spilled_bytes == 0, symbol
        assert not used.serialized, symbol
        assert 0 < used.registers <= (64 if symbol.endswith("_1") else 255), symbol


def test_nothing_is_spilled_of_a_models_largest_sum(tmp_path):
    """Llama-3.1-8B's down projection: offsets that no instruction holds take registers."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    spec = kernels_cuda_linear.spec_of("linear", 4096, 14336, residual=True)
    kernels = {
        f"{kind}_{variant.min_tokens}": Linear(packed).build(spec, variant.config, TARGET)
        for kind, packed in KINDS.items()
        for variant in Linear(packed).variants(spec, TARGET)
    }
    resources = cuda_build.build_library(kernels, TARGET, tmp_path / "kernels.so")
    assert {"plain_1", "plain_9", "lossless_1", "lossless_9"} <= resources.keys()
    assert [symbol for symbol, used in resources.items() if used.spilled_bytes or used.serialized] == []


def test_machine_code_has_what_the_kernels_are_about(machine_code, built):
    assert machine_code.keys() == built[1].keys()
    for symbol, code in machine_code.items():
        form, kind, number = symbol.rsplit("_", 2)
        config = built[2][form, kind][int(number)]
        product = f"HGMMA.64x{config['tokens']}x16.F32.BF16" if config["kind"] == "wide" else "HMMA.16816.F32.BF16"
        # Streamed products take x from L1, wide ones copy it to shared memory.
        loads = ("LDG.E.128", "LDS.128") if config["kind"] == "stream" else ("LDS.128",)
        for instruction in (product, "LDGSTS.E.BYPASS", *loads, "ACQBULK", "PREEXIT"):
            assert instruction in code, f"{symbol} has no {instruction}"
        # x and the weights are copied 16 bytes at a time.
        assert not re.search(r"LDGSTS(?!\.E\.BYPASS\S*\.128)", code), symbol
        assert not re.search(r"\b(LDL|STL)\b", code), f"{symbol} uses local memory"
        # The weights of a lossless kernel are on their way before the kernel waits for the one before it.
        assert code.index("LDGSTS") < code.index("ACQBULK"), symbol
        # Of a lossless weight's table of rows, words: of x, residual and bias nothing.
        early = loads_before_waiting(code)
        assert set(early) <= {"LDG.E"} if kind == "lossless" else not early, (symbol, early)


def test_library_needs_the_ffi_abi_alone(built):
    command = ["nm", "-D", "--undefined-only", str(built[0])]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert {symbol for symbol in symbols if symbol.startswith("TVM")} <= ABI
    assert not [symbol for symbol in symbols if re.match(r"cu(da)?[A-Z]", symbol)]


def test_library_loads_without_tvm_or_gpu(built):
    code = (
        "import sys, torch, tvm_ffi\n"
        f"kernel = tvm_ffi.load_module({str(built[0])!r})['linear_plain_1']\n"
        f"x, w, y = (torch.zeros(s, dtype=torch.bfloat16) for s in ((1, {K}), ({N}, {K}), (1, {N})))\n"
        "assert 'tvm' not in sys.modules\n"
        "try: kernel(x, w, y)\n"
        "except ValueError as error: assert 'expected cuda' in str(error), error\n"
        "else: raise SystemExit('ran on CPU tensors')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_nvcc_is_reported(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(TargetError, match="nvcc was not found"):
        cuda_build.find_nvcc()


@pytest.mark.parametrize(("n", "k", "served"), [(320, 576, True), (328, 576, False), (320, 570, False)])
def test_serves_whole_blocks_only(n, k, served):
    inputs, _ = LINEAR.sample(torch.Generator(), torch.bfloat16, 5, k, n)
    spec = harness.op_spec(LINEAR, {"x": inputs["x"], "weight": inputs["weight"]}, {})
    assert Linear(packed=True).serves(spec, TARGET) is served


def test_halves_of_a_gated_weight_are_whole_tiles():
    inputs, _ = GATE_UP_SILU.sample(torch.Generator(), torch.bfloat16, 5, 64, 24)
    assert not GateUpSilu(packed=False).serves(harness.op_spec(GATE_UP_SILU, inputs, {}), TARGET)


@pytest.mark.parametrize(
    ("capability", "driver", "message"),
    [((8, 0), (590, 1), "sm_90a"), ((10, 0), (590, 1), "10.0"), ((9, 0), (535, 2), "535.2")],
)
def test_other_gpus_and_old_drivers_are_refused(capability, driver, message):
    cuda.require(cuda.CAPABILITY, cuda.MIN_DRIVER)
    with pytest.raises(TargetError, match=message):
        cuda.require(capability, driver)


class OnGPU:
    """One form of a kernel on the GPU."""

    def __init__(self, built, form, kind):
        self.module = tvm_ffi.load_module(str(built[0]))
        self.form, self.kind, self.variants = form, kind, built[2][form, kind]
        self.op = FORMS[form][0]

    def arguments(self, inputs):
        on_gpu = {name: tensor.cuda() for name, tensor in inputs.items()}
        if self.kind == "lossless":
            on_gpu["weight"] = lossless.pack(on_gpu["weight"])
        out = torch.full((len(inputs["x"]), N // 2 if self.op is GATE_UP_SILU else N), float("nan"))
        return [*on_gpu.values(), out.to("cuda", torch.bfloat16)]

    def run(self, inputs, variant=None):
        """Results of the variant made for this many tokens."""
        arguments = self.arguments(inputs)
        chosen = variant or max(m for m in matmul.BUCKETS if m in self.variants and m <= max(len(inputs["x"]), 1))
        with tvm_ffi.use_torch_stream():
            self.module[f"{self.form}_{self.kind}_{chosen}"](*arguments)
        return arguments[-1].cpu()


@pytest.fixture(params=[(form, kind) for form in FORMS for kind in KINDS], ids="-".join)
def on_gpu(request, built):
    return OnGPU(built, *request.param)


@needs_gpu
def test_matches_reference(on_gpu, generator):
    for tokens in (1, 2, 7, 8, 9, 16, 23, 32, 33, 64, 70):
        inputs = sample(on_gpu.form, generator, tokens)
        expected = harness.results(on_gpu.op, inputs, {})
        for variant in on_gpu.variants:
            harness.assert_matches(on_gpu.op, (on_gpu.run(inputs, variant),), expected)


@needs_gpu
def test_comparison_sees_one_wrong_input(on_gpu, generator):
    inputs = sample(on_gpu.form, generator, 9)
    expected = harness.results(on_gpu.op, inputs, {})
    for name in inputs:
        changed = inputs[name].clone()
        changed.view(-1)[-1] += 4
        with pytest.raises(AssertionError):
            harness.assert_matches(on_gpu.op, (on_gpu.run({**inputs, name: changed}),), expected)


@needs_gpu
def test_rows_do_not_depend_on_the_batch(on_gpu, generator):
    inputs = sample(on_gpu.form, generator, 64)
    for variant in on_gpu.variants:
        whole = on_gpu.run(inputs, variant)
        for tokens in (1, 5, 12, 29, 40):
            part = {name: t[:tokens] if name in ("x", "residual") else t for name, t in inputs.items()}
            assert torch.equal(on_gpu.run(part, variant), whole[:tokens])


@needs_gpu
def test_nan_stays_in_its_row(on_gpu, generator):
    inputs = sample(on_gpu.form, generator, 9)
    clean = on_gpu.run(inputs)
    x = inputs["x"].clone()
    x[4, 3] = float("nan")
    dirty = on_gpu.run({**inputs, "x": x})
    assert dirty[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(dirty[others], clean[others])


@needs_gpu
def test_no_tokens(on_gpu, generator):
    inputs = sample(on_gpu.form, generator, 3)
    assert len(on_gpu.run({name: t[:0] if name in ("x", "residual") else t for name, t in inputs.items()})) == 0


@needs_gpu
@pytest.mark.parametrize("variant", [1, 33, 102])
def test_graph_replay_equals_eager(on_gpu, generator, variant):
    inputs = sample(on_gpu.form, generator, 8)
    arguments = on_gpu.arguments(inputs)
    kernel = on_gpu.module[f"{on_gpu.form}_{on_gpu.kind}_{variant}"]
    graph = torch.cuda.CUDAGraph()
    with tvm_ffi.use_torch_stream(torch.cuda.graph(graph)):
        kernel(*arguments)
    for _ in range(3):
        again = sample(on_gpu.form, generator, 8)
        again["weight"] = inputs["weight"]
        arguments[0].copy_(again["x"])
        for place, name in enumerate(inputs):
            if name not in ("x", "weight"):
                arguments[place].copy_(again[name])
        arguments[-1].fill_(float("nan"))
        graph.replay()
        assert torch.equal(arguments[-1].cpu(), on_gpu.run(again, variant))


@needs_gpu
@pytest.mark.parametrize("variant", [1, 33, 102])
def test_runs_on_the_current_stream(on_gpu, generator, variant):
    """What is queued on the stream before the kernel is done before it reads."""
    inputs = sample(on_gpu.form, generator, 8)
    arguments = on_gpu.arguments(inputs)
    x = arguments[0].clone()
    arguments[0].zero_()
    torch.cuda.synchronize()
    with tvm_ffi.use_torch_stream(torch.cuda.stream(torch.cuda.Stream())):
        torch.cuda._sleep(20_000_000)
        arguments[0].copy_(x)
        on_gpu.module[f"{on_gpu.form}_{on_gpu.kind}_{variant}"](*arguments)
        result = arguments[-1].clone()
    torch.cuda.synchronize()
    assert torch.equal(result.cpu(), on_gpu.run(inputs, variant))


@needs_gpu
@pytest.mark.parametrize("variant", [1, 33, 102])
def test_chain_of_dependent_launches(built, generator, variant):
    """Kernels that start while the one before still runs see its results all the same."""
    linear = OnGPU(built, "linear", "lossless")
    square = (torch.randn(N, K, generator=generator) * K**-0.5).bfloat16()
    packed, x = lossless.pack(square.cuda()), torch.randn(8, K, generator=generator).bfloat16().cuda()
    kernel = linear.module[f"linear_lossless_{variant}"]

    def chain():
        y = torch.zeros(8, N, device="cuda", dtype=torch.bfloat16)
        wide = x.clone()
        for _ in range(40):
            with tvm_ffi.use_torch_stream():
                kernel(wide, packed, y)
                kernel(wide, packed, y)
            wide[:, :N] = y
        return y

    first = chain()
    for _ in range(5):
        assert torch.equal(chain(), first)
