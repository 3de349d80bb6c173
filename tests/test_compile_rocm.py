"""`--target rocm` on a machine without ROCm: what is in the artifact, what is refused, and the artifact itself, run.

The whole program runs as it would on a GPU, over a HIP whose launches PoCL executes (tests/rocm_on_host).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tvm import tirx

from tests import models
from tests.families import random_model
from tests.rocm_on_host import hip, needs_lld, needs_opencl, opencl
from tests.rocm_on_host.tensor import call
from vllm_compile import streamed
from vllm_compile.driver import CompileOptions, compile_model, lower_model
from vllm_compile.errors import TargetError, UnsupportedError
from vllm_compile.runtime import executor
from vllm_compile.runtime.manifest import read_manifest
from vllm_compile.runtime.plan import KernelStep, from_json
from vllm_compile.runtime.program import load, read_weights
from vllm_compile.schedules.rocm import matmul
from vllm_compile.targets import resolve
from vllm_compile.verify import verify

from .conftest import SEED

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 160,
}
PROMPTS = (27,) * 4  # of fewer tokens errors differ by chance
SHORT_PROMPTS = (5,) * 8
without_gpu = pytest.mark.skipif(Path("/sys/class/kfd").exists(), reason="there may be an AMD GPU on this machine")
pytestmark = needs_lld


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Iterator[Path]:
    """Gates and ups lossless, though the chip would read so small ones faster plain."""
    directory = tmp_path_factory.mktemp("rocm") / "model"
    models.llama(SEED, dtype="bfloat16", initializer_range=0.05, **SIZES).save_pretrained(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matmul, "pays", lambda spec, target, gated: gated)
        yield directory


@pytest.fixture(scope="module")
def artifact(model) -> Path:
    return compile_model(model, "rocm", model.with_name("artifact")).artifact


@dataclass
class Programs:
    """Executes launches: each kernel is compiled for the CPU when it is first launched."""

    kernels: dict[str, tirx.PrimFunc]
    compiled: dict[str, opencl.Program] = field(default_factory=dict)

    def __call__(self, launch: hip.Launch) -> None:
        symbol = launch.kernel.rpartition("_kernel")[0]  # what follows it is of a second launch
        if symbol not in self.compiled:
            self.compiled[symbol] = opencl.Program({symbol: self.kernels[symbol]})
        self.compiled[symbol](launch)


def programs(model: Path) -> Programs:
    machine = resolve("rocm")
    return Programs(
        {
            symbol: kernels.choice.family.build(kernels.spec, variant.config, machine)
            for kernels in lower_model(model, machine).kernels.values()
            for symbol, variant in kernels.distinct().items()
        }
    )


@pytest.fixture
def on_host(monkeypatch):
    """Kernels of an artifact are called with host tensors as those of a GPU."""

    def load_kernels(path: Path):
        kernels = executor.load_kernels(path)
        return lambda symbol: lambda *arguments: call(kernels(symbol), *map(torch.from_dlpack, arguments))

    monkeypatch.setattr(streamed, "load_kernels", load_kernels)


@needs_opencl
def test_the_artifact_computes_what_hugging_face_does(model, artifact, on_host):
    """Prefill of two requests in one batch, then decoding, layer by layer and end to end."""
    execute = programs(model)
    with hip.recording(execute) as recorded:
        report = verify(artifact, model, "cpu", lengths=PROMPTS, seed=SEED)
    assert report.passed, report
    assert report.kl < 10 * report.reference_kl + 1e-6
    plan = from_json((artifact / "plan.json").read_text())
    operators = {step.op for function in plan.functions.values() for step in function.steps if hasattr(step, "op")}
    families = {symbol.rsplit("_", 1)[0] for symbol in execute.compiled}
    assert len(families) >= len(operators) - 1, "all but the gate that a vendor's product leaves"
    assert {launch.device for launch in recorded.launches} == {0}

    # A rotation of the wrong sign shows.
    wrong = next(symbol for symbol in execute.compiled if "rope" in symbol)
    right = execute.compiled[wrong]

    def swapped(launch):
        arguments = {**launch.arguments, "cos_TD": launch.arguments["sin_TD"], "sin_TD": launch.arguments["cos_TD"]}
        right(hip.Launch(**{**vars(launch), "arguments": arguments}))

    execute.compiled[wrong] = swapped
    with hip.recording(execute):
        assert not verify(artifact, model, "cpu", lengths=PROMPTS, seed=SEED).passed


@needs_opencl
def test_a_mixture_of_experts(on_host, tmp_path):
    """Mixtral: many short prompts, as `verify` has them for routers; experts in another order show."""
    path = tmp_path / "model"
    random_model("Mixtral", **SIZES).bfloat16().save_pretrained(path)
    artifact = compile_model(path, "rocm", tmp_path / "artifact").artifact
    execute = programs(path)
    with hip.recording(execute):
        report = verify(artifact, path, "cpu", lengths=SHORT_PROMPTS, seed=SEED)
    assert report.passed, report
    for op in ("route", "expert_linear", "expert_gate_up_silu", "elementwise"):
        assert any(symbol.startswith(op) for symbol in execute.compiled), op

    experts = next(symbol for symbol in execute.compiled if symbol.startswith("expert_linear"))
    right = execute.compiled[experts]

    def shuffled(launch):
        arguments = {**launch.arguments, "order": launch.arguments["experts"]}
        right(hip.Launch(**{**vars(launch), "arguments": arguments}))

    execute.compiled[experts] = shuffled
    with hip.recording(execute):
        assert not verify(artifact, path, "cpu", lengths=SHORT_PROMPTS, seed=SEED).passed


def test_manifest_and_plan(artifact):
    manifest = read_manifest(artifact)
    assert (manifest["target"]["name"], manifest["target"]["features"]) == ("rocm", ["gfx942"])
    assert manifest["verdict"]["outcome"] == "not-run"
    plan = from_json((artifact / "plan.json").read_text())
    steps = [s for f in plan.functions.values() for s in f.steps if isinstance(s, KernelStep)]
    assert {s.op for s in steps if s.large is not None} == {"linear", "gate_up_silu"}
    packed = [name for name, _ in read_weights(artifact) if name.endswith(".lossless12")]
    assert packed
    assert all("gate_up" in name for name in packed)
    assert set(plan.restored.values()) == set(packed), "for hipBLASLt"
    assert all(kernel["family"].startswith("rocm.") for kernel in manifest["kernels"])


def test_the_library_loads_without_tvm_and_without_rocm(artifact):
    code = "import sys, tvm_ffi; tvm_ffi.load_module(sys.argv[1]); print('tvm' in sys.modules)"
    command = [sys.executable, "-c", code, str(artifact / "kernels.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@without_gpu
def test_no_gpu(artifact):
    with pytest.raises(TargetError, match="no AMD GPU"):
        load(artifact)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx950"])
def test_other_gpus_by_name(arch, model, tmp_path):
    result = compile_model(model, arch, tmp_path / "artifact", CompileOptions(weightless=True))
    assert read_manifest(result.artifact)["target"]["features"] == [arch]


def test_what_is_not_served_is_named(model, tmp_path):
    with pytest.raises(UnsupportedError, match=r"target rocm has no kernel for .* float32"):
        compile_model(model, "rocm", tmp_path / "artifact", CompileOptions(dtype="float32", dummy_weights=0))
    assert not (tmp_path / "artifact").exists()
