"""What is predicted of chips that nobody measured: the table of docs/analysis.md, and where its numbers come from."""

from __future__ import annotations

import re

import pytest
from transformers import LlamaConfig

from tests.analysis.predictions import DOCS, MODELS
from vllm_compile import driver
from vllm_compile.analysis.analyze import analyze
from vllm_compile.quantities import duration
from vllm_compile.targets import CHIPS, DETECT, resolve

TARGETS = {
    "gaudi2": "Intel Gaudi 2",
    "gaudi3": "Intel Gaudi 3",
    "rocm": "AMD Instinct MI300X",
    "gfx90a": "AMD Instinct MI250X",
    "gfx950": "AMD Instinct MI355X",
}
ROW = re.compile(r"^\| ([^|]+) \| (\w+), (\d+) (?:request|prompt)s? \| ([\d.]+ ms) \| ([\d.]+ ms) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def analyse(tmp_path_factory):
    """Llama-3.1-8B on a target's chip; the model is imported once, fused for each."""
    directory = tmp_path_factory.mktemp("model")
    LlamaConfig(**MODELS["Llama-3.1-8B"], architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("trace", "import_model"):
            patch.setattr(driver, name, once(getattr(driver, name)))
        yield lambda target: analyze(directory, target, [1, 64], [1024])


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
    steps = {(s.phase, s.batch): (duration(s.bound_ms / 1e3), duration(s.predicted_ms / 1e3)) for s in found.steps}
    rows = [row[1:] for row in ROW.findall(DOCS.read_text()) if row[0] in TARGETS[target]]
    assert len(rows) == 3
    for phase, batch, *written in rows:
        assert tuple(written) == steps[phase, int(batch)]


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
