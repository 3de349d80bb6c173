"""What is predicted of chips that nobody measured: the table of docs/analysis.md, and where its numbers come from."""

from __future__ import annotations

import re

import pytest
from transformers import LlamaConfig, MixtralConfig

from tests.analysis.predictions import DOCS, MODELS
from vllm_compile import driver
from vllm_compile.analysis.analyze import analyze
from vllm_compile.analysis.cost import Workload
from vllm_compile.analysis.graph import Call
from vllm_compile.analysis.kernels import Chooser
from vllm_compile.quantities import duration
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets import CHIPS, DETECT, resolve

TARGETS = {
    "gaudi2": "Intel Gaudi 2",
    "gaudi3": "Intel Gaudi 3",
    "rocm": "AMD Instinct MI300X",
    "gfx90a": "AMD Instinct MI250X",
    "gfx950": "AMD Instinct MI355X",
}
ROW = re.compile(r"^\| ([^|]+) \| (\w+), (\d+) (?:request|prompt)s? \| ([\d.]+ ms) \| ([\d.]+ ms) \|$", re.MULTILINE)
MIXTRAL = {"vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2, "dtype": "bfloat16"}  # the 8x7B


@pytest.fixture(scope="module")
def analyse(tmp_path_factory):
    """Llama-3.1-8B on a target's chip; the model is imported once, fused for each."""
    directory = tmp_path_factory.mktemp("model")
    LlamaConfig(**MODELS["Llama-3.1-8B"], architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    imported = {name: once(getattr(driver, name)) for name in ("trace", "import_model")}

    def analyse(target):
        with pytest.MonkeyPatch.context() as patch:
            for name, function in imported.items():
                patch.setattr(driver, name, function)
            return analyze(directory, target, [1, 64], [1024])

    return analyse


def once(function):
    """What `function` gives when it is first called."""
    results = []

    def call(*arguments):
        if not results:
            results.append(function(*arguments))
        return results[0]

    return call


@pytest.mark.parametrize("target", TARGETS)
def test_the_table_in_the_docs(target, analyse):
    found = analyse(target)
    assert found.chip.name == TARGETS[target]
    assert not found.warnings
    rows = [row[1:] for row in ROW.findall(DOCS.read_text()) if row[0] in TARGETS[target]]
    assert len(rows) == 3
    for phase, batch, *written in rows:
        assert tuple(written) == steps_of(found)[phase, int(batch)]


def steps_of(found):
    return {(s.phase, s.batch): (duration(s.bound_ms / 1e3), duration(s.predicted_ms / 1e3)) for s in found.steps}


def test_mixtral_in_the_docs(tmp_path):
    """On an MI300X; where its kernels read the weights of all experts for one token, the step would take far longer."""
    MixtralConfig(**MIXTRAL, architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    found = analyze(tmp_path, "rocm", [1, 64], [1024])
    assert not found.warnings
    rows = [row[1:] for row in ROW.findall(DOCS.read_text()) if row[0] == "MI300X, Mixtral-8x7B"]
    assert {(phase, int(batch)): tuple(written) for phase, batch, *written in rows}.items() <= steps_of(found).items()
    assert len(rows) == 3
    step = next(s for s in found.steps if (s.phase, s.batch) == ("decode", 1))
    whole = found.weight_bytes / found.chip.bandwidth * 1e3
    assert step.bound_ms < step.predicted_ms < 0.5 * whole


def test_launches_of_a_split_cache_and_of_a_router():
    """On ROCm few requests' caches are split, and a second launch adds up the parts; a router sorts in a second one."""
    q = TensorSpec((Sym.TOKENS, 32, 128), "bfloat16")
    kv = TensorSpec((Sym.BLOCKS, 8, Sym.BLOCK_SIZE, 256), "bfloat16", strided=True)
    table = TensorSpec((Sym.REQUESTS, Sym.TABLE_WIDTH), "int32")
    lengths, starts = (TensorSpec((of,), "int32") for of in (Sym.REQUESTS, Sym.BOUNDARIES))
    inputs = (("q", q), ("kv", kv), ("block_table", table), ("seq_lens", lengths), ("query_start_loc", starts))
    attention = OpSpec("paged_attention", inputs, (q,), (("scale", 0.1),))
    logits, indices = TensorSpec((Sym.TOKENS, 8), "bfloat16"), TensorSpec((Sym.TOKENS, 2), "int32")
    scores = TensorSpec((Sym.TOKENS, 2), "float32")
    results = (indices, scores, indices, indices)
    route = OpSpec("route", (("logits", logits),), results, (("normalise", True), ("top_k", 2)))
    chooser = Chooser(resolve("rocm"))

    def launches(spec, requests):
        (kernel,) = chooser.compiled(Call("layer_0", spec, {}, {}, 1, once=False), Workload(requests, 1, 1023))
        return kernel.launches

    assert [launches(attention, requests) for requests in (1, 32, 64)] == [2, 2, 1]
    assert launches(route, 1) == 2


def test_packing_saves_bytes_and_no_launches(analyse):
    """On ROCm attention of a request is two launches, packed or not; the weights of the logits are read packed."""
    step = next(s for s in analyse("rocm").steps if (s.phase, s.batch) == ("decode", 1))
    (saving,) = (saving for saving in step.savings if saving.what == "lossless packing")
    assert saving.kernels == 0
    assert saving.bytes > 0
    assert saving.seconds > 0


@pytest.mark.parametrize("target", TARGETS)
def test_no_prediction_beats_the_peaks(target):
    machine = resolve(target)
    (chip,) = CHIPS[machine.resolved_by].values()
    assert chip.sustained_bandwidth < chip.bandwidth
    assert chip.sustained_matrix["bfloat16"] < chip.matrix["bfloat16"]
    assert chip.vector <= chip.matrix["float32"] < chip.matrix["bfloat16"]
    assert chip.cache_bytes >= machine.l2_bytes
    assert len(chip.sources) == 3


def test_every_target_has_chips():
    assert {resolve(name).resolved_by for name in DETECT} == set(CHIPS)
