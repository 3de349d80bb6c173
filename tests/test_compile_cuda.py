"""`--target cuda` on a machine without a GPU: what is in the artifact, and what is refused.

Kernels themselves are tested in tests/schedules; running a whole artifact needs a Hopper GPU.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import models
from tests.families import WIDE, WINDOW, random_model
from tests.schedules.expressions import rotation, spec_of
from tests.schedules.harness import op_spec
from vllm_compile import lossless, ops
from vllm_compile.cache import Cache
from vllm_compile.driver import CompileOptions, CompileResult, compile_model
from vllm_compile.errors import ArtifactError, TargetError
from vllm_compile.runtime import gpu
from vllm_compile.runtime.manifest import check_target, read_manifest
from vllm_compile.runtime.plan import KernelStep, Large, VendorCall, from_json
from vllm_compile.runtime.program import Program, load, read_weights
from vllm_compile.schedules.cuda import build
from vllm_compile.schedules.cuda.build import build_library, source
from vllm_compile.schedules.select import choose
from vllm_compile.targets import cuda

from .conftest import SEED

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
}
pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
without_driver = pytest.mark.skipif(
    any(Path("/proc/driver/nvidia").glob("*")), reason="there is an NVIDIA driver on this machine"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("cuda") / "model"
    models.llama(SEED, dtype="bfloat16", initializer_range=0.02, **SIZES).save_pretrained(directory)
    return directory


def compiled(model: Path, out: Path, **options) -> CompileResult:
    return compile_model(model, "cuda", out, CompileOptions(**options))


@pytest.fixture(scope="module")
def packed(model) -> CompileResult:
    return compiled(model, model.with_name("packed"))


def test_weights_are_packed_and_restored_bit_for_bit(model, packed):
    stored = dict(read_weights(packed.artifact))
    plan = from_json((packed.artifact / "plan.json").read_text())
    checkpoint = load_file(model / "model.safetensors")
    for layer in range(2):
        weight = checkpoint[f"model.layers.{layer}.mlp.down_proj.weight"]
        (name,) = [name for name in stored if f"layers_{layer}_" in name and "down_proj" in name]
        assert name.endswith(".lossless12")
        assert torch.equal(lossless.unpack(stored[name], *weight.shape).view(torch.int16), weight.view(torch.int16))
    assert set(plan.restored.values()) == {name for name in stored if name.endswith(".lossless12")}
    assert not plan.restored.keys() & stored.keys(), "what is restored is not stored too"


def test_large_batches_go_to_vendors_with_plain_weights(packed):
    plan = from_json((packed.artifact / "plan.json").read_text())
    steps = [s for f in plan.functions.values() for s in f.steps if isinstance(s, KernelStep)]
    large = {s.op: s.large for s in steps if s.large is not None}
    assert large.keys() == {"linear", "gate_up_silu", "qkv_rope_attention"}
    assert large["qkv_rope_attention"].prefill
    rotation, attention = large["qkv_rope_attention"].steps
    assert rotation.op == "qkv_rope_cache"
    assert dict(attention.arguments)["q"] == rotation.arguments[-1]
    assert [name for name, _ in attention.attributes] == ["scale"]
    vendor, epilogue = large["gate_up_silu"].steps
    assert isinstance(large["gate_up_silu"], Large)
    assert isinstance(vendor, VendorCall)
    assert epilogue.op == "silu_mul"
    arguments = dict(vendor.arguments)
    assert arguments["weight"].spec.dtype == "bfloat16"
    assert arguments["out"].buffer == epilogue.arguments[0].buffer


@without_driver
def test_residuals_of_vendors_products_lie_where_the_sums_will(packed):
    plan = from_json((packed.artifact / "plan.json").read_text())
    steps = [s for f in plan.functions.values() for s in f.steps if isinstance(s, KernelStep) and s.large is not None]
    calls = [dict(part.arguments) for s in steps for part in s.large.steps if isinstance(part, VendorCall)]
    sums = [(call["residual"].buffer, call["out"].buffer) for call in calls if "residual" in call]
    assert sums == [(plan.functions["layer_0"].results[0].buffer,) * 2], "down's"


def test_a_program_is_made_without_its_device(packed):
    """The front end does so: where it initialized CUDA, vLLM would spawn the engine, which imports everything again."""
    manifest, plan = read_manifest(packed.artifact), from_json((packed.artifact / "plan.json").read_text())
    program = Program(packed.artifact, plan, manifest)
    assert program.device.type == "cuda"
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):  # as anything would that touches it
        program.prepare(max_tokens=1)


def test_the_most_probable_token_is_an_entry_point(packed):
    greedy = from_json((packed.artifact / "plan.json").read_text()).functions["greedy"]
    (step,) = greedy.steps
    assert (step.op, step.family) == ("argmax", "cuda.argmax")
    assert step.arguments == (*greedy.inputs, *greedy.results)
    assert (greedy.results[0].spec.dtype, greedy.weights) == ("int64", ())


def test_windows_and_soft_caps(tmp_path, monkeypatch):
    """Gemma 2's, layer by layer: FlashAttention is told of caps; prompts with a window go to a kernel of ours."""
    sources = []
    monkeypatch.setattr(build, "source", lambda *given: sources.append(source(*given)) or sources[-1])
    random_model("Gemma 2", **WIDE).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    result = compiled(tmp_path / "model", tmp_path / "artifact", weightless=True)
    plan = from_json((result.artifact / "plan.json").read_text())
    layers = [plan.functions[name] for name in sorted(plan.functions) if name.startswith("layer_")]
    steps = [s for f in layers for s in f.steps if isinstance(s, KernelStep) and s.op == "qkv_rope_attention"]
    within, whole = (s.large.steps[-1] for s in steps)
    assert isinstance(whole, VendorCall)
    assert dict(whole.attributes)["soft_cap"] == 50.0
    assert "window" not in dict(whole.attributes)
    assert isinstance(within, KernelStep)
    assert within.family == "cuda.prefill_attention"
    rotation = steps[0].large.steps[0]
    assert (within.arguments[0], within.arguments[-1]) == (rotation.arguments[-1], steps[0].arguments[-1])
    # The device function that each kernel calls: its last arguments are the window, and the bits of the cap.
    (code,) = sources
    function = r"(\w+)_kernel\([^;{}]*\) \{[^}]*vllm_compile::(?:rope|prefill)_attention<([\d, ]+)>"
    called = dict(re.findall(function, code))
    cap = struct.unpack("I", struct.pack("f", 50.0))[0]
    found = [[called.pop(symbol).split(", ")[-2:] for _, symbol in step.variants] for step in (*steps, within)]
    assert found == [[[str(window), str(cap)]] * count for window, count in ((WINDOW, 3), (0, 3), (WINDOW, 1))]
    assert not called


def test_experts(tmp_path):
    """Mixtral's stay plain, as the checkpoint has them; the router's few rows have a kernel of their own."""
    model = random_model("Mixtral", **WIDE).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    result = compiled(tmp_path / "model", tmp_path / "artifact")
    plan = from_json((result.artifact / "plan.json").read_text())
    steps = [step for step in plan.functions["layer_0"].steps if isinstance(step, KernelStep)]
    families = [step.family for step in steps]
    routed = ["cuda.row_linear", "cuda.route", "cuda.expert_gate_up_silu", "cuda.expert_linear", "cuda.elementwise"]
    assert families[-5:] == routed
    assert [step.large is None for step in steps[-5:]] == [False, True, True, True, True]
    stored = dict(read_weights(result.artifact))
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(stored[f"model_layers_{layer}_mlp_experts_{name}"], getattr(experts, name))


def test_same_kernels_each_time(model, packed, tmp_path):
    """Built again, and from a cache: the same bytes."""
    cache = Cache(tmp_path / "cache")
    results = [
        compile_model(model, "cuda", tmp_path / name, CompileOptions(weightless=True), cache=cache)
        for name in ("built", "cached")
    ]
    assert [result.built for result in results] == [len(packed.kernels), 0]
    for name in ("kernels.so", "plan.json"):
        assert len({(result.artifact / name).read_bytes() for result in [packed, *results]}) == 1, name


def test_kernels_of_other_families(tmp_path):
    """Norms, a rotation of heads and the write of the cache, through nvcc; nothing spills."""
    target, generator = cuda.for_chip(), torch.Generator().manual_seed(SEED)
    specs = [spec_of(rotation("bfloat16", interleaved, 4, 64)) for interleaved in (False, True)]
    for op in (ops.LAYER_NORM, ops.KV_CACHE_WRITE):
        specs.append(op_spec(op, *op.sample(generator, torch.bfloat16, 5, 64)))
    kernels = {f"kernel_{i}": choose(spec, target).family.build(spec, {}, target) for i, spec in enumerate(specs)}
    resources = build_library(kernels, target, tmp_path / "kernels.so")
    assert resources.keys() == kernels.keys()
    assert not any(used.spilled_bytes for used in resources.values())


def test_plain_weights(model, tmp_path):
    result = compiled(model, tmp_path / "plain", pack="none")
    assert not [name for name, _ in read_weights(result.artifact) if "lossless" in name]
    assert from_json((result.artifact / "plan.json").read_text()).restored == {}


def test_weights_that_do_not_fit_stay_plain(model, tmp_path):
    """Exponents spread evenly: no window of 15 holds them."""
    spread = shutil.copytree(model, tmp_path / "model")
    checkpoint = load_file(spread / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    shape = checkpoint[name].shape
    checkpoint[name] = torch.exp2(torch.randint(-100, 0, shape).float()).bfloat16()
    save_file(checkpoint, spread / "model.safetensors", {"format": "pt"})
    result = compiled(Path(spread), tmp_path / "artifact")
    (warning,) = [w for w in result.warnings if "stay plain" in w]
    assert "down_proj" in warning
    kinds = {name.split(".")[0]: "lossless" in name for name, _ in read_weights(result.artifact) if "proj" in name}
    assert not any(is_packed for name, is_packed in kinds.items() if "down_proj" in name)
    assert any(kinds.values()), "the others are packed all the same"


def test_without_weights(model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    result = compiled(bare, tmp_path / "artifact", weightless=True)
    assert not list(result.artifact.glob("*.safetensors"))
    assert result.verdict == {"outcome": "not-run", "reason": "compiled without weights"}


@without_driver
def test_no_gpu(packed):
    assert packed.verdict["outcome"] == "not-run"
    assert "needs a Hopper GPU" in packed.verdict["reason"]
    with pytest.raises(TargetError, match="no NVIDIA driver"):
        load(packed.artifact)


@pytest.mark.parametrize(("capability", "driver", "message"), [((8, 0), (580, 0), "8.0"), ((9, 0), (535, 1), "535.1")])
def test_other_gpu_or_old_driver(packed, monkeypatch, capability, driver, message):
    monkeypatch.setattr(gpu, "detect", lambda: gpu.Gpu("NVIDIA A100", capability, driver, 80 << 30))
    manifest = read_manifest(packed.artifact)
    with pytest.raises(TargetError, match=message):
        check_target(manifest["target"]["name"], manifest["target"]["features"], packed.artifact)


def test_changed_manifest(packed, tmp_path):
    copy = Path(shutil.copytree(packed.artifact, tmp_path / "artifact"))
    manifest = json.loads((copy / "manifest.json").read_text())
    assert manifest["target"]["chip"] == "h200"
    manifest["target"]["chip"] = "h100"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="differs"):
        read_manifest(copy)
