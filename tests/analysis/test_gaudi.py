"""What is predicted of a Gaudi: the table of docs/analysis.md, and where its numbers come from."""

from __future__ import annotations

import re

import pytest
from transformers import LlamaConfig

from tests.analysis.predictions import DOCS, MODELS
from vllm_compile.analysis.analyze import analyze
from vllm_compile.quantities import duration
from vllm_compile.targets import CHIPS, resolve

ROW = re.compile(r"^\| Gaudi (\d) \| (\w+), (\d+) (?:request|prompt)s? \| ([\d.]+ ms) \| ([\d.]+ ms) \|$", re.MULTILINE)


@pytest.mark.parametrize("generation", ["2", "3"])
def test_the_table_in_the_docs(generation, tmp_path):
    LlamaConfig(**MODELS["Llama-3.1-8B"], architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    target = f"gaudi{generation}"
    analysis = analyze(tmp_path, target, [1, 64], [1024])
    assert analysis.chip.name == f"Intel Gaudi {generation}"
    assert not analysis.warnings
    steps = {(s.phase, s.batch): (duration(s.bound_ms / 1e3), duration(s.predicted_ms / 1e3)) for s in analysis.steps}
    rows = [row[1:] for row in ROW.findall(DOCS.read_text()) if row[0] == generation]
    assert len(rows) == 3
    for phase, batch, *written in rows:
        assert tuple(written) == steps[phase, int(batch)]


@pytest.mark.parametrize("target", ["gaudi2", "gaudi3"])
def test_no_prediction_beats_the_peaks(target):
    (chip,) = CHIPS[target].values()
    assert chip.sustained_bandwidth < chip.bandwidth
    assert chip.sustained_matrix["bfloat16"] < chip.matrix["bfloat16"]
    assert chip.cache_bytes == resolve(target).l2_bytes
    assert len(chip.sources) == 3
