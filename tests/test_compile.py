"""From a model directory to an artifact, through the library."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vllm_compile
from tests import models
from tests.conftest import SEED
from vllm_compile import driver
from vllm_compile.errors import ArtifactError, ModelError, UnsupportedError
from vllm_compile.quick_verification import not_run, quick_verification
from vllm_compile.runtime.manifest import check_files, read_manifest


def manifest_of(artifact: Path) -> dict:
    return json.loads((artifact / "manifest.json").read_text())


class TestArtifact:
    def test_is_a_model_directory(self, tiny, tiny_fp32):
        config, original = (json.loads((d / "config.json").read_text()) for d in (tiny_fp32, tiny))
        assert config["architectures"] == ["VllmCompileForCausalLM"]
        assert config["vllm_compile"]["architectures"] == ["LlamaForCausalLM"]
        assert config["dtype"] == "float32"
        assert config["hidden_size"] == original["hidden_size"]
        assert (tiny_fp32 / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()

    def test_manifest_describes_every_file(self, tiny_fp32):
        manifest = read_manifest(tiny_fp32)
        check_files(tiny_fp32, manifest)
        assert {path.name for path in tiny_fp32.iterdir()} == {*manifest["files"], "manifest.json"}
        assert {"config.json", "kernels.so", "model-00001.safetensors", "plan.json"} <= manifest["files"].keys()
        assert manifest["passes"][0] == {"name": "page_kv_cache", "matches": 2}
        assert manifest["source"]["dummy_weights_seed"] is None
        assert set(manifest["target"]["features"]) >= {"avx2", "fma"}

    def test_every_kernel_of_the_plan_is_described(self, tiny_fp32):
        plan = json.loads((tiny_fp32 / "plan.json").read_text())
        steps = [step for function in plan["functions"].values() for step in function["steps"]]
        called = {symbol for step in steps for _, symbol in step.get("variants", [])}
        assert called == {kernel["symbol"] for kernel in manifest_of(tiny_fp32)["kernels"]}

    def test_verdict(self, tiny_fp32):
        verdict = manifest_of(tiny_fp32)["verdict"]
        assert verdict["outcome"] == "pass", verdict

    def test_verdict_of_bfloat16(self, tiny_bf16):
        """It may go by chance, for its 54 tokens: errors differ by 3 % (a standard deviation), 10 % are allowed."""
        verdict = manifest_of(tiny_bf16)["verdict"]
        assert verdict["error"] < 1.25 * verdict["reference_error"], verdict
        assert (verdict["outcome"] == "pass") == (verdict["error"] <= 1.1 * verdict["reference_error"])

    def test_weights_are_the_checkpoints_bits(self, tiny, tiny_fp32):
        """Those that no kernel wants rearranged."""
        stored, source = _tensors(tiny_fp32), _tensors(tiny)
        same = {name: name.replace(".", "_") for name in source}
        plain = {name: stored[renamed] for name, renamed in same.items() if renamed in stored}
        assert "model.norm.weight" in plain
        assert "model.embed_tokens.weight" in plain
        assert all(tensor.equal(source[name]) for name, tensor in plain.items())


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for shard in directory.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.fixture
def no_kernels(monkeypatch):
    """Compile without building kernels, which comes before the weights and takes long, nor running them."""
    monkeypatch.setattr(driver, "build_library", lambda kernels, target, path: path.write_bytes(b"none"))
    monkeypatch.setattr("vllm_compile.quick_verification.quick_verification", lambda *_: not_run("no kernels"))


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A model directory that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.mark.usefixtures("no_kernels")
class TestWithoutKernels:
    def test_tensor_of_another_shape(self, copy, tmp_path):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
        with pytest.raises(ModelError, match=r"mlp.*: shape \[72, 64\] in the checkpoint, .* \[96, 64\]"):
            vllm_compile.compile(copy, out=tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_tensor_missing(self, copy, tmp_path):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
        with pytest.raises(ModelError, match=r"tensors missing in its safetensors: model\.layers\.2\."):
            vllm_compile.compile(copy, out=tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_tied_weights_of_different_shapes(self, tmp_path, monkeypatch):
        """Found before any kernel is built, as all shapes are."""
        models.save(tmp_path / "model", SEED, tie_word_embeddings=True)
        (shard,) = [
            p for p in (tmp_path / "model").glob("*.safetensors") if "model.embed_tokens.weight" in load_file(p)
        ]
        tensors = load_file(shard)
        save_file({**tensors, "lm_head.weight": torch.zeros(81, 64)}, shard, {"format": "pt"})
        monkeypatch.setattr(driver, "build_library", lambda *_: pytest.fail("a kernel was built"))
        with pytest.raises(ModelError, match=r"lm_head.weight: shape \[81, 64\] .* \[80, 64\], being tied to model"):
            vllm_compile.compile(tmp_path / "model", out=tmp_path / "out")

    def test_not_run_is_a_verdict(self, tiny, tmp_path, monkeypatch):
        """The library is no library: that is what the verdict says."""
        monkeypatch.setattr("vllm_compile.quick_verification.quick_verification", quick_verification)
        result = vllm_compile.compile(tiny, out=tmp_path / "out")
        assert result.verdict["outcome"] == "not-run"
        assert manifest_of(result.artifact)["verdict"] == result.verdict
        assert result.verdict["reason"]

    def test_seeds_of_dummy_weights(self, tiny, tmp_path):
        one, again, two = (
            vllm_compile.compile(tiny, out=tmp_path / str(i), dummy_weights=seed).artifact
            for i, seed in enumerate((1, 1, 2))
        )
        files = [(d / "model-00001.safetensors").read_bytes() for d in (one, again, two)]
        assert files[0] == files[1]
        assert files[0] != files[2]
        assert manifest_of(two)["source"]["dummy_weights_seed"] == 2

    def test_nothing_but_the_config_is_needed(self, tiny, tmp_path):
        bare = tmp_path / "bare"
        bare.mkdir()
        shutil.copy(tiny / "config.json", bare)
        assert vllm_compile.compile(bare, out=tmp_path / "out", dummy_weights=0).artifact.is_dir()

    def test_tied_weights_under_either_name(self, tmp_path):
        """Checkpoints name the shared tensor after the embedding or after the head."""
        model = models.save(tmp_path / "tied", SEED, tie_word_embeddings=True)
        result = vllm_compile.compile(tmp_path / "tied", out=tmp_path / "out")
        stored = _tensors(result.artifact)
        assert any(tensor.equal(model.lm_head.weight) for tensor in stored.values())

    def test_strict(self, tmp_path):
        models.save(tmp_path / "model", SEED, mlp_bias=True)
        with pytest.raises(UnsupportedError, match=r"passes matched nothing: fuse_gate_up \(--strict\)"):
            vllm_compile.compile(tmp_path / "model", out=tmp_path / "out", strict=True)

    def test_unwritten_dump(self, tiny, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ArtifactError, match="file: cannot be written"):
            vllm_compile.compile(tiny, out=tmp_path / "out", dump=tmp_path / "file")


# The command, which stops where the library would be built.
UNFINISHED = """
import sys, time
from vllm_compile import cli, driver
def build_library(*arguments):
    print("ready", flush=True)
    time.sleep(3600)
driver.build_library = build_library
cli.main(["compile", "--no-cache", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_killed_while_it_compiles(tiny, tiny_fp32, no_kernels, tmp_path):
    """The older artifact stays whole, and the next run does not mind what the killed one left."""
    artifact = Path(shutil.copytree(tiny_fp32, tmp_path / "artifact"))
    command = [sys.executable, "-c", UNFINISHED, "--model", tiny, "--out", artifact]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert artifact.with_name(".artifact.partial").exists()
    check_files(artifact, read_manifest(artifact))
    vllm_compile.compile(tiny, out=artifact)
    assert (artifact / "kernels.so").read_bytes() == b"none"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


# Not ru_maxrss, which starts at the peak of the process that started this one.
PEAK = """
import resource, sys
from pathlib import Path
from vllm_compile import driver, verify
def peak():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
model, artifact = map(Path, sys.argv[1:])
"""
# Without weights first, which leaves the kernels in the cache: what compiling them takes is not what weights take.
# Both processes live at once; what the kernel says of the children is at least the peak of this one.
COMPILE = """
from vllm_compile.cache import Cache
peaks = {}
def progress(stage):
    peaks[stage] = peak()
options = driver.CompileOptions(weightless=WEIGHTLESS)
cache = Cache(artifact.with_name("cache"))
result = driver.compile_model(model, out=artifact, options=options, progress=progress, cache=cache)
assert (result.built == 0) != WEIGHTLESS
children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(peaks["verify"], peaks["verify"] - peaks.get("weights", 0), children)
"""
VERIFY = """
start = peak()
verify.verify(artifact, model, quick=True)
print(peak() - start)
"""


@pytest.mark.slow
def test_peak_memory(tmp_path):
    """A model of 430 MB in shards of 50 MB: at no time is it in memory as a whole."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 17, "vocab_size": 8192}
    model = models.llama(SEED, dtype="bfloat16", initializer_range=0.02, **sizes | {"max_position_embeddings": 256})
    model.save_pretrained(tmp_path / "model", max_shard_size="50MB")
    shards = [path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")]
    assert sum(shards) > 400e6
    assert max(shards) < 60e6

    def run(script: str) -> list[int]:
        command = [sys.executable, "-c", PEAK + script, tmp_path / "model", tmp_path / "artifact"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return list(map(int, done.stdout.splitlines()[-1].split()))

    kernels, _, _ = run(COMPILE.replace("WEIGHTLESS", "True"))
    _, weights, children = run(COMPILE.replace("WEIGHTLESS", "False"))
    (verification,) = run(VERIFY)
    total = kernels + weights + children  # all at once, as in a compile with nothing cached
    grown = f"{weights / 1e6:.0f} MB of them for weights, {verification / 1e6:.0f} MB for verification"
    print(f"compiler and verification {total / 1e6:.0f} MB, {grown}, model {sum(shards) / 1e6:.0f} MB")
    assert weights < 2 * max(shards), "growth while weights are read, merged, packed and written"
    assert verification < sum(shards) / 2, "growth while two references and the artifact are run, layer by layer"
    assert total < max(shards) + 2 * 2**30
