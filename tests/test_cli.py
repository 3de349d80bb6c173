"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import models
from tests.conftest import SEED
from vllm_compile.cli import main
from vllm_compile.paged_batch import PagedBatch
from vllm_compile.relax_passes.pipeline import OPTIONAL, passes_for
from vllm_compile.runtime import manifest as files
from vllm_compile.streamed import StreamedProgram
from vllm_compile.targets import cpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A model directory that a test may damage."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def artifact(tiny_fp32, tmp_path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(tiny_fp32, tmp_path / "artifact"))


def change_json(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def refused(capsys):
    """`refused(words, *arguments)`: the command ends with exit code 2 and one line that holds `words`."""

    def check(words: str, *arguments: object) -> None:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.strip().splitlines()
        assert line.startswith("error: ")
        assert words in line

    return check


class TestSecondCompile:
    """The model of `tiny_fp32` once more, in a process of its own, with all that can be asked for."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        return tmp_path_factory.mktemp("second")

    @pytest.fixture(scope="class")
    def done(self, tiny, folder) -> subprocess.CompletedProcess:
        arguments = [
            "--out",
            folder / "artifact",
            "--dump",
            folder / "dump",
            "--dtype",
            "float32",
            "--strict",
            "--no-cache",
        ]
        command = [sys.executable, "scripts/compile.py", "--model", tiny, *arguments, "--json"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    def test_succeeds(self, done):
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("name", ["plan.json", "kernels.so", "config.json", "model-00001.safetensors"])
    def test_same_bytes(self, done, folder, tiny_fp32, name):
        assert (folder / "artifact" / name).read_bytes() == (tiny_fp32 / name).read_bytes()

    def test_same_manifest_but_for_one_field(self, done, folder, tiny_fp32):
        first, second = (json.loads((d / "manifest.json").read_text()) for d in (tiny_fp32, folder / "artifact"))
        built = first.pop("built"), second.pop("built")
        assert first == second
        assert all(set(field) == {"time", "host"} for field in built)

    def test_summary_is_the_last_line(self, done, folder):
        *_, last = done.stdout.splitlines()
        summary = json.loads(last)
        assert summary["artifact"] == str(folder / "artifact")
        assert summary["verdict"]["outcome"] == "pass"
        assert [record["name"] for record in summary["passes"]] == [p.info.name for p in passes_for()]
        assert {record["name"] for record in summary["passes"] if record["matches"] == 0} == OPTIONAL
        assert summary["warnings"] == []
        assert {kernel["op"] for kernel in summary["kernels"]} >= {"linear", "paged_attention", "rms_norm"}
        assert summary["seconds"].keys() >= {"import", "passes", "kernels", "weights", "verify"}

    def test_tables_are_for_people(self, done):
        assert len(done.stdout.splitlines()) == 1
        for word in ("fuse_gate_up", "page_kv_cache", "cpu.rms_norm", "verified: pass", "vllm serve"):
            assert word in done.stderr

    def test_dump(self, done, folder):
        dumped = sorted(path.name for path in (folder / "dump").iterdir())
        assert dumped == [f"{i:02d}_{transform.info.name}.py" for i, transform in enumerate(passes_for())]
        first, last = ((folder / "dump" / name).read_text() for name in (dumped[0], dumped[-1]))
        assert "def main(" in first
        assert "vllm_compile.paged_attention" in first
        assert "def weights(" in last
        assert "vllm_compile.qkv_rope_cache" in last
        for name in dumped:
            compile((folder / "dump" / name).read_text(), name, "exec")


class TestRefusedModels:
    def compile(self, model, out="never") -> tuple:
        return "compile", "--model", model, "--out", out

    def test_missing(self, refused, tmp_path):
        refused("no such model directory", *self.compile(tmp_path / "absent", tmp_path / "out"))
        assert not list(tmp_path.iterdir())

    def test_unreadable_config(self, refused, copy, tmp_path):
        (copy / "config.json").write_text("{")
        refused("config.json: not JSON", *self.compile(copy, tmp_path / "out"))

    def test_no_weights(self, refused, copy, tmp_path):
        for path in copy.glob("*.safetensors*"):
            path.unlink()
        refused("neither model.safetensors nor", *self.compile(copy, tmp_path / "out"))

    def test_truncated_weights(self, refused, copy, tmp_path):
        shard = sorted(copy.glob("*.safetensors"))[-1]
        shard.write_bytes(shard.read_bytes()[:-1])
        refused("is the file whole?", *self.compile(copy, tmp_path / "out"))

    def test_shard_missing(self, refused, copy, tmp_path):
        shard = sorted(copy.glob("*.safetensors"))[-1]
        shard.unlink()
        refused(f"shard missing: {shard.name}", *self.compile(copy, tmp_path / "out"))

    def test_architecture(self, refused, copy, tmp_path):
        change_json(copy / "config.json", model_type="whatever", architectures=["WhateverForCausalLM"])
        refused("architecture WhateverForCausalLM", *self.compile(copy, tmp_path / "out"))

    def test_operator(self, refused, tmp_path):
        models.save(tmp_path / "model", SEED, hidden_act="relu6")
        refused("decoder layer 0, 1: operator relax.clip", *self.compile(tmp_path / "model", tmp_path / "out"))

    def test_dtype(self, refused, copy, tmp_path):
        change_json(copy / "config.json", dtype="float16")
        refused("dtype float16 is not supported; pass --dtype", *self.compile(copy, tmp_path / "out"))

    def test_quantised(self, refused, copy, tmp_path):
        change_json(copy / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
        refused("checkpoints quantised by gptq are not supported", *self.compile(copy, tmp_path / "out"))

    def test_strict(self, refused, tmp_path):
        models.save(tmp_path / "model", SEED, mlp_bias=True)
        refused("fuse_gate_up (--strict)", *self.compile(tmp_path / "model", tmp_path / "out"), "--strict")


class TestRefusedTargets:
    def test_unknown(self, refused, tiny, tmp_path):
        out = tmp_path / "out"
        refused("unknown target 'tpu'", "compile", "--model", tiny, "--out", out, "--target", "tpu")

    def test_machine_is_none(self, refused, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr(cpu, "host_features", lambda: cpu.AVX2 - {"fma"})
        refused("target cpu needs fma", "compile", "--model", tiny, "--out", tmp_path / "out")


class TestRefusedOutput:
    @pytest.mark.parametrize("name", ["folder", "folder/file"])
    def test_what_is_no_artifact(self, refused, tiny, tmp_path, name):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").write_text("precious")
        refused("is no compiled artifact", "compile", "--model", tiny, "--out", tmp_path / name)
        assert (tmp_path / "folder" / "file").read_text() == "precious"

    def test_here(self, refused, tiny, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("precious")
        monkeypatch.chdir(tmp_path)
        refused("is no compiled artifact", "compile", "--model", tiny, "--out", ".")


def test_wrong_options(capsys):
    for arguments in ([], ["compile"], ["compile", "--model", "x", "--out", "y", "--dtype", "int3"], ["knit"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "usage: vllm-compile" in capsys.readouterr().err


class TestVerify:
    @pytest.fixture
    def verify(self, tiny, capsys):
        """`verify(artifact)` -> (exit code, report)."""

        def run(artifact: Path, seed: int = SEED) -> tuple[int, dict]:
            code = main(["verify", str(artifact), "--model", str(tiny), "--seed", str(seed), "--json"])
            return code, json.loads(capsys.readouterr().out.splitlines()[-1])

        return run

    def test_good(self, tiny_fp32, verify):
        code, report = verify(tiny_fp32)
        assert code == 0
        assert report["passed"]
        assert report["error"] < 1e-4
        assert report["agreement"] > 0.99  # of 249 tokens, of which two may nearly tie
        assert report["greedy"] is None, "a CPU's names no tokens"
        assert len(report["layers"]) == 2, "layer 0, and layer 1 with the final norm"
        assert max(report["layers"]) < 1e-4

    @pytest.mark.parametrize(("shift", "passed"), [(0, True), (1, False)])
    def test_its_own_choice_of_tokens(self, tiny_fp32, verify, monkeypatch, shift, passed):
        """Of programs that name the most probable token themselves; here a stand-in for their kernel."""

        def greedy(program, logits):
            tokens = logits.argmax(-1, keepdim=True)
            tokens[0] += shift
            return tokens

        monkeypatch.setattr(StreamedProgram, "greedy", greedy)
        code, report = verify(tiny_fp32)
        assert (report["passed"], code) == (passed, 0 if passed else 1)
        assert report["greedy"] == (1.0 if passed else pytest.approx(1 - 1 / report["tokens"]))
        assert report["error"] < 1e-4

    def test_good_bfloat16(self, tiny_bf16, verify):
        code, report = verify(tiny_bf16)
        assert code == 0
        assert report["error"] <= 1.1 * report["reference_error"]
        assert torch.get_default_dtype() == torch.float32, "as it was before"

    BREAKS = {  # noqa: RUF012
        "mask": lambda step, decoding: step["seq_lens"].add_(1),
        "position": lambda step, decoding: step["positions"].add_(1) if decoding else None,
        "block table": lambda step, decoding: step["block_table"].copy_(step["block_table"].roll(1)),
        "slots": lambda step, decoding: step["slot_mapping"].sub_(1),
    }

    @pytest.mark.parametrize("what", BREAKS)
    def test_broken_batches_fail(self, tiny_fp32, verify, monkeypatch, what):
        """Off by one in the causal mask, in RoPE behind the prompt, in where pages are and go."""
        make, step = PagedBatch.__init__, PagedBatch.step

        def zeroed(self, *arguments):
            make(self, *arguments)
            self.kv = [cache.zero_() for cache in self.kv]  # it must fail without the help of NaN

        def broken(self, begin, end):
            result = step(self, begin, end)
            result["block_table"] = result["block_table"].clone()
            self.BREAK(result, max(begin) > 0)
            return result

        monkeypatch.setattr(PagedBatch, "__init__", zeroed)
        assert verify(tiny_fp32)[0] == 0
        monkeypatch.setattr(PagedBatch, "step", broken)
        monkeypatch.setattr(PagedBatch, "BREAK", staticmethod(self.BREAKS[what]), raising=False)
        code, report = verify(tiny_fp32)
        assert code == 1
        assert not report["passed"]
        assert report["error"] > 1e-3

    def test_swapped_weights_fail(self, artifact, verify):
        """Between two layers, with a manifest that does not give it away."""
        shard = artifact / "model-00001.safetensors"
        tensors = load_file(shard)
        first, second = sorted(name for name in tensors if "mlp_down_proj" in name)
        tensors[first], tensors[second] = tensors[second], tensors[first]
        save_file(tensors, shard, metadata={"format": "pt"})
        manifest = json.loads((artifact / "manifest.json").read_text())
        manifest["files"][shard.name] = files.sha256(shard)
        manifest["digest"] = files.content_digest(manifest)
        (artifact / "manifest.json").write_text(json.dumps(manifest))
        code, report = verify(artifact)
        assert code == 1
        assert min(report["layers"][0], report["error"]) > 1e-3, "the layer that is wrong shows"

    def test_script(self, tiny, tiny_fp32):
        command = [sys.executable, "scripts/verify.py", tiny_fp32, "--model", tiny, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["passed"]
        assert "relative error" in done.stderr


class TestRefusedArtifacts:
    def test_missing(self, refused, tiny, tmp_path):
        refused("no compiled artifact here", "verify", tmp_path / "absent", "--model", tiny)

    def test_one_byte_changed(self, refused, tiny, artifact):
        content = bytearray((artifact / "kernels.so").read_bytes())
        content[len(content) // 2] ^= 1
        (artifact / "kernels.so").write_bytes(content)
        refused("kernels.so differs from what was compiled", "verify", artifact, "--model", tiny)

    def test_newer_schema(self, refused, tiny, artifact):
        change_json(artifact / "manifest.json", schema=files.SCHEMA + 1)
        refused("update vllm-compile", "verify", artifact, "--model", tiny)

    def test_another_processor(self, refused, tiny, artifact, monkeypatch):
        monkeypatch.setattr(cpu, "host_features", lambda: frozenset({"sse2"}))
        refused("which this machine lacks", "verify", artifact, "--model", tiny)

    def test_model_is_missing(self, refused, tiny_fp32, tmp_path):
        refused("no such model directory", "verify", tiny_fp32, "--model", tmp_path / "absent")


def test_version_is_importable_without_torch_or_tvm():
    code = "import sys, vllm_compile; print({'torch', 'tvm', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
