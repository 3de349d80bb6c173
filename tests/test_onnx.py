"""ONNX models compiled, run and served: the same greedy tokens as ONNX Runtime."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import vllm_compile
from tests.families import NEW_TOKENS, prompts, random_model, served
from tests.frontend.test_onnx import EOS, WHOLE_CACHE, rounded
from tests.greedy import same_tokens
from tests.onnx_models import GRAPH, VOCABULARY, build, continued, llama, logits
from vllm_compile import driver
from vllm_compile.accuracy import relative_error
from vllm_compile.analysis.analyze import analyze
from vllm_compile.cli import main
from vllm_compile.driver import lower_model
from vllm_compile.paged_batch import PagedBatch
from vllm_compile.runtime.manifest import read_manifest
from vllm_compile.targets import resolve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_kernels")]


def compiled_logits(artifact: Path, ids: torch.Tensor) -> torch.Tensor:
    """[T, V] for one prompt."""
    program = vllm_compile.load(artifact)
    batch = PagedBatch(program.plan.model, [len(ids)])
    step = batch.step([0], [len(ids)])
    return program.logits(program(ids.int(), step.pop("positions"), batch.kv, **step))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A Llama's graph in fp32; the model that it was built from is in `hf` beside it."""
    return build(tmp_path_factory.mktemp("onnx"), llama())


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def artifact(directory, cache) -> Path:
    return vllm_compile.compile(directory / GRAPH, out=directory.with_name("artifact"), cache=cache).artifact


def test_float32(artifact, directory):
    """Several requests at once, prefilled and decoded; the logits differ in the order of sums."""
    requests = prompts()
    assert same_tokens(served(artifact, requests), [continued(directory, ids, NEW_TOKENS) for ids in requests])
    assert relative_error(compiled_logits(artifact, requests[0]), logits(directory, requests[0])) < 1e-5


def test_another_model_is_noticed(artifact, directory, tmp_path):
    """Negative control: without the biases that the model does not have."""
    other = build(tmp_path, llama(attention_bias=True))
    ids = prompts()[0]
    assert relative_error(compiled_logits(artifact, ids), logits(other, ids)) > 1e-2


def test_the_same_kernels_as_from_hugging_face(artifact, directory, cache):
    """None is compiled, and every logit is the same to the last bit."""
    result = vllm_compile.compile(directory.with_name("hf"), out=directory.with_name("reference"), cache=cache)
    assert (result.built, result.verdict["outcome"]) == (0, "pass")
    ids = prompts()[0]
    assert torch.equal(compiled_logits(artifact, ids), compiled_logits(result.artifact, ids))
    first, second = (read_manifest(a)["files"]["kernels.so"] for a in (artifact, result.artifact))
    assert first == second


def test_verified_by_what_it_was_built_from(artifact, directory, tmp_path, capsys):
    """Each layer on Hugging Face's input for it; another model's weights are seen."""
    assert main(["verify", str(artifact), "--model", str(directory.with_name("hf")), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(report["layers"]) == 2, "the last with the final norm"
    assert max(report["layers"]) < 1e-5
    other = llama()
    other.model.layers[1].mlp.down_proj.weight.data.neg_()
    other.save_pretrained(tmp_path)
    assert main(["verify", str(artifact), "--model", str(tmp_path)]) == 1


def test_windows_and_caps(tmp_path):
    """Gemma 2's, past the window."""
    directory = build(tmp_path, random_model("Gemma 2", **EOS), **WHOLE_CACHE)
    artifact = vllm_compile.compile(directory, out=tmp_path / "artifact").artifact
    requests = prompts()
    assert same_tokens(served(artifact, requests), [continued(directory, ids, NEW_TOKENS) for ids in requests])


def test_bfloat16(tmp_path, generator):
    """No more than 1.1 times the error of Hugging Face's bfloat16; the exact logits are ONNX Runtime's in fp32."""
    model = rounded(llama(), torch.bfloat16)
    exact_in, given = build(tmp_path, model), build(tmp_path, model, "bf16")
    artifact = vllm_compile.compile(given, out=tmp_path / "artifact").artifact
    drawn = [torch.randint(3, VOCABULARY, (90,), generator=generator) for _ in range(3)]
    exact, ours = (
        torch.cat(list(map(f, [of] * 3, drawn))) for f, of in ((logits, exact_in), (compiled_logits, artifact))
    )
    model = model.bfloat16()
    with torch.no_grad():
        theirs = torch.cat([model(input_ids=ids[None]).logits[0] for ids in drawn])
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= 1.1 * relative_error(theirs, exact)


def test_behind_vllm(artifact, directory):
    """Prefilled in chunks, all requests at once."""
    from vllm import LLM, SamplingParams, TokensPrompt

    requests = prompts()
    llm = LLM(str(artifact), skip_tokenizer_init=True, max_num_batched_tokens=32, max_num_seqs=4, max_model_len=96)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids.tolist()) for ids in requests], sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert same_tokens(tokens, [continued(directory, ids, NEW_TOKENS) for ids in requests])


class TestUnchanged:
    """A compile that has nothing to do does nothing, though an ONNX model has not been verified."""

    @pytest.fixture(autouse=True)
    def _no_kernels(self, monkeypatch):
        monkeypatch.setattr(driver, "build_library", lambda kernels, target, path: path.write_bytes(b"kernels"))

    def test_files_of_the_graph(self, tmp_path):
        directory = build(tmp_path, llama())

        def compile():
            return vllm_compile.compile(directory, out=tmp_path / "out", cache=tmp_path / "cache")

        assert compile().verdict["outcome"] == "not-run"
        assert compile().unchanged
        for name in (GRAPH, f"{GRAPH}.data", "genai_config.json", "tokenizer.json"):
            (directory / name).write_bytes(_changed(directory / name))
            assert not compile().unchanged, name
            assert compile().unchanged, name

    def test_digest_is_that_of_graph_and_tensors(self, tmp_path):
        directory = build(tmp_path, llama())
        vllm_compile.compile(directory, out=tmp_path / "out")
        before = read_manifest(tmp_path / "out")["source"]["sha256"]
        data = directory / f"{GRAPH}.data"
        data.write_bytes(_changed(data))
        vllm_compile.compile(directory, out=tmp_path / "out")
        assert read_manifest(tmp_path / "out")["source"]["sha256"] != before


def _changed(path: Path) -> bytes:
    """Something that is read the same way: another weight, another name, another line break."""
    content = path.read_bytes()
    if path.suffix == ".data":
        return bytes([content[0] ^ 1]) + content[1:]
    return content.replace(b"onnxruntime-genai", b"onnxruntime-other") if path.name == GRAPH else content + b"\n"


@pytest.mark.parametrize("target", ["cpu", "cuda", "rocm"])
def test_the_same_calls_on_every_target(target, tmp_path):
    """Of kernels, chosen in the same way."""
    directory = build(tmp_path, llama(hidden_size=256, head_dim=128, intermediate_size=512))
    lowered = [lower_model(path, resolve(target), "bfloat16") for path in (directory, tmp_path / "hf")]
    ours, theirs = ({symbol: kernels.spec for symbol, kernels in one.kernels.items()} for one in lowered)
    assert ours == theirs


def test_analyzed(directory):
    """Every figure is that of the model that it was built from, up to what is known by names."""
    paths = (directory, directory / GRAPH, directory.with_name("hf"))
    graph, same, model = (analyze(path, "cuda", [1], [64], chip="h100", dtype="bfloat16") for path in paths)
    assert graph.parameters == same.parameters == model.parameters
    assert graph.blocks == model.blocks
    times = [[step.predicted_ms for step in analysis.steps] for analysis in (graph, same, model)]
    assert times[0] == times[1] == times[2]


def test_commands_that_need_hugging_face_say_so(artifact, directory, capsys):
    for model in (directory, directory / GRAPH):
        assert main(["verify", str(artifact), "--model", str(model)]) == 2
        assert "an ONNX model, where the Hugging Face one that it was built from is needed" in capsys.readouterr().err


def test_quantised_is_one_line_before_any_kernel(tmp_path, monkeypatch, capsys):
    def build_library(*_):
        raise AssertionError("a kernel was built")

    monkeypatch.setattr(driver, "build_library", build_library)
    directory = build(tmp_path, llama(), "int4")
    assert main(["compile", "--model", str(directory), "--out", str(tmp_path / "out"), "--no-cache"]) == 2
    assert "MatMulNBits /model/layers.0/attn/qkv_proj" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
