"""`--target gaudi2` on a machine without a Gaudi: the artifact, and its program, run by torch on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import models
from tests.families import random_model
from tests.runtime.run_steps import run_steps
from vllm_compile.accuracy import relative_error
from vllm_compile.compilation import CompileOptions
from vllm_compile.driver import compile_model
from vllm_compile.errors import BucketError, TargetError, UnsupportedError
from vllm_compile.runtime.buckets import Bucket, BucketPlan, Work
from vllm_compile.runtime.manifest import BUCKETS, LIBRARY, PLAN, TPC_SOURCES, read_manifest
from vllm_compile.runtime.padded_steps import Lengths, batches_of, shape_of
from vllm_compile.runtime.plan import TorchStep, from_json
from vllm_compile.runtime.program import load
from vllm_compile.verify import verify

from .conftest import SEED

VOCABULARY = 80
BLOCK = 16  # tokens of a block in PagedBatch
PROMPTS, STEPS = (70, 1, 33, 20), [[40, 0, 0, 20], [41, 1, 30, 20], [69, 1, 31, 20], [70, 1, 33, 20]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("gaudi") / "model"
    models.save(directory, SEED, max_position_embeddings=256)
    return directory


@pytest.fixture(scope="module")
def artifact(model) -> Path:
    return compile_model(model, "gaudi2", model.with_name("artifact")).artifact


@pytest.fixture(scope="module")
def hugging_face(model):
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return lambda ids: reference(ids[None].long()).logits[0].detach()


def prompts(generator) -> list[torch.Tensor]:
    return [torch.randint(0, VOCABULARY, (n,), generator=generator, dtype=torch.int32) for n in PROMPTS]


def buckets(*shapes: tuple[int, int, int], block_size: int = BLOCK) -> BucketPlan:
    return BucketPlan(tuple(sorted(Bucket(*shape) for shape in shapes)), Work(4.0, 1.0), block_size)


ENOUGH = buckets((1, 1, 8), (4, 1, 24), (1, 48, 0), (1, 32, 3), (1, 40, 8))


def test_compiled_and_verified(artifact, model):
    manifest = read_manifest(artifact)
    assert manifest["verdict"]["outcome"] == "pass"
    assert manifest["target"] == {"name": "gaudi2", "features": ["gaudi2"], "tvm": {}}
    assert {TPC_SOURCES, PLAN} < manifest["files"].keys()
    assert LIBRARY not in manifest["files"]
    assert all(kernel["family"].startswith("gaudi.") for kernel in manifest["kernels"])
    plan = from_json((artifact / PLAN).read_text())
    assert plan.runs_in_torch
    assert from_json(plan.to_json()).to_json() == plan.to_json()
    report = verify(artifact, model, "gaudi2", seed=SEED)
    assert report.passed
    assert max(report.layers) < 1e-5, "each layer, on Hugging Face's input"


def test_bfloat16_from_the_command_line(model, tmp_path):
    command = [sys.executable, "scripts/compile.py", "--model", model, "--target", "gaudi3", "--dtype", "bfloat16"]
    command += ["--no-cache", "--out", tmp_path / "artifact", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    verdict = json.loads(done.stdout.splitlines()[-1])["verdict"]
    assert done.returncode == (0 if verdict["outcome"] == "pass" else 1), done.stderr
    assert verdict["error"] < 1.25 * verdict["reference_error"]  # of 54 tokens: 1.1 would fail by chance
    assert read_manifest(tmp_path / "artifact")["target"]["features"] == ["gaudi3"]


def test_a_wrong_rotation_is_noticed(artifact, model, tmp_path):
    """Negative control of the verification: cosines for sines in the first layer's plan."""
    plan = from_json((artifact / PLAN).read_text())

    def exchanged(step):
        if not isinstance(step, TorchStep) or "cos" not in dict(step.inputs):
            return step
        named = dict(step.inputs)
        return replace(step, inputs=tuple((n, named[{"cos": "sin", "sin": "cos"}.get(n, n)]) for n in named))

    functions = {n: replace(f, steps=tuple(map(exchanged, f.steps))) for n, f in plan.functions.items()}
    changed = Path(tmp_path / "changed")
    subprocess.run(["cp", "-r", artifact, changed], check=True)
    (changed / PLAN).write_text(replace(plan, functions=functions).to_json())
    assert not verify(changed, model, "gaudi2", seed=SEED, quick=True).passed


@pytest.mark.parametrize("plan", [None, ENOUGH], ids=["exact shapes", "buckets"])
def test_prefill_decode_and_both_equal_hugging_face(plan, artifact, hugging_face, generator):
    program = load(artifact)
    program._executor.buckets = plan
    shapes = set()
    inner = program._executor._graphs["forward"]

    def record(inputs):
        requests, length = inputs["seq_lens"].shape[0], inputs["block_table"].shape[0]
        shapes.add((requests, inputs["input_ids"].shape[0] // requests, length))
        return inner(inputs)

    program._executor._graphs["forward"] = record
    texts = prompts(generator)
    for ours, prompt in zip(run_steps(program, texts, STEPS), texts, strict=True):
        assert relative_error(ours, hugging_face(prompt)) < 1e-4
    if plan is not None:  # nothing but the shapes that there are graphs of
        own = {(b.batch, b.queries, b.blocks if b.decodes else b.blocks + -(-b.queries // BLOCK)) for b in plan.buckets}
        assert shapes <= own
        steps = [Lengths([e - b for b, e in zip(*pair, strict=True)], pair[1]) for pair in pairwise([[0] * 4, *STEPS])]
        exact = {shape_of(batch, step, BLOCK) for step in steps for batch in batches_of(step, together=False)}
        assert len(shapes) < len(exact), "steps of several shapes run in one graph"


def test_buckets_in_the_artifact(model, tmp_path, hugging_face, generator):
    ENOUGH.write(tmp_path / "b.json")
    options = CompileOptions(buckets=tmp_path / "b.json")
    artifact = compile_model(model, "gaudi2", tmp_path / "artifact", options).artifact
    assert BUCKETS in read_manifest(artifact)["files"]
    program = load(artifact)
    assert program._executor.buckets == ENOUGH
    texts = prompts(generator)
    for ours, prompt in zip(run_steps(program, texts, STEPS), texts, strict=True):
        assert relative_error(ours, hugging_face(prompt)) < 1e-4
    with pytest.raises(TargetError, match="buckets are for targets whose graphs are static"):
        compile_model(model, "cpu", tmp_path / "cpu", options)


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (buckets((4, 1, 24), (1, 8, 0)), r"no bucket covers \[1, 40, 0\]"),
        (buckets((4, 1, 24), (1, 48, 0), block_size=128), "for KV blocks of 128 tokens; the cache has blocks of 16"),
    ],
)
def test_buckets_that_do_not_do(plan, complaint, artifact, generator):
    program = load(artifact)
    program._executor.buckets = plan
    with pytest.raises(BucketError, match=complaint):
        run_steps(program, prompts(generator), STEPS)


def test_it_loads_without_tvm_and_without_intels_software(artifact):
    code = "import sys; from vllm_compile.runtime.program import load; p = load(sys.argv[1]); "
    code += "print(p.device, 'tvm' in sys.modules, 'habana_frameworks' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, artifact], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu", "False", "False"]


def test_sources_of_kernels(artifact, model, tmp_path):
    with zipfile.ZipFile(artifact / TPC_SOURCES) as archive:
        names = set(archive.namelist())
        glue = archive.read("glue.cpp").decode()
    kernels = {name.removesuffix(".c") for name in names if name.endswith(".c")}
    assert {"glue.cpp", "operators.cpp", "Makefile"} < names
    assert {kernel.rsplit("_", 2)[0] for kernel in kernels} == {
        "rms_norm", "add_rms_norm", "qkv_rope_cache", "gate_up_silu",
    }  # fmt: skip
    told = {
        dict(step.attributes).get("kernel")
        for function in from_json((artifact / PLAN).read_text()).functions.values()
        for step in function.steps
        if isinstance(step, TorchStep)
    }
    assert told - {None} == kernels, "each is called by a step"
    assert "DEVICE_ID_GAUDI2" in glue
    again = compile_model(model, "gaudi2", tmp_path / "again", CompileOptions(weightless=True)).artifact
    assert (again / TPC_SOURCES).read_bytes() == (artifact / TPC_SOURCES).read_bytes()


@pytest.mark.parametrize("family", ["GPT-2", "Gemma 2", "Qwen 3"])
def test_other_families(family, tmp_path):
    """Layer norms, windows, soft caps, and what is left for elementwise operators."""
    random_model(family).save_pretrained(tmp_path / "model")
    assert compile_model(tmp_path / "model", "gaudi2", tmp_path / "artifact").verdict["outcome"] == "pass"


def test_a_mixture_of_experts_is_refused(tmp_path):
    random_model("Mixtral").save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="target gaudi2 has no kernel for route"):
        compile_model(tmp_path / "model", "gaudi2", tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()
