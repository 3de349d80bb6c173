"""Blocks, weights and savings of whole models."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.families import FAMILIES, SIZES
from vllm_compile.analysis.analyze import analyze
from vllm_compile.analysis.report import render
from vllm_compile.errors import TargetError
from vllm_compile.lossless import offsets
from vllm_compile.schedules.cuda import records
from vllm_compile.targets.cuda import H100, H200

# Family -> norms outside and inside a layer, residual adds of a layer (parallel blocks share one).
STRUCTURE = {
    "Cohere": (1, 1, 1),
    "DeepSeek-V2-Lite": (1, 3, 2),
    "Gemma 3": (1, 6, 2),
    "GPT-2": (1, 2, 2),
    "GPT-NeoX": (1, 2, 1),
    "OLMo 2": (1, 4, 2),
    "Phi-3": (1, 2, 2),
    "Qwen 2": (1, 2, 2),
}


@pytest.mark.parametrize("family", STRUCTURE)
def test_blocks_and_parameters_of_families(family, tmp_path):
    kind, options = FAMILIES[family]
    config = AutoConfig.for_model(kind, **SIZES | options)
    config.save_pretrained(tmp_path)
    found = analyze(tmp_path, "cpu", [2], [8], H200)
    outside, norms, adds = STRUCTURE[family]
    assert {name: found.blocks[name] for name in ("attention", "feed-forward", "norms", "residual adds")} == {
        "attention": 2,
        "feed-forward": 2,
        "norms": outside + 2 * norms,
        "residual adds": 2 * adds,
    }
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.warnings == []
    assert "</html>" in render(found)


def test_launches_saved_by_fusion(analysis):
    """Counted by hand."""
    step = analysis.steps[0]
    rows = {saving.what: saving for saving in step.savings}
    assert rows.keys() >= {"fuse_rms_norm", "fuse_rope_cache", "lossless packing", "KV tiling"}
    # Two layers of 7 kernels, embedding and RoPE's two rows, the last norm, the output projection.
    assert sum(op.times for op in step.ops) == 2 * 7 + 5
    # Of each norm all but one: cast, square, mean, + eps, rsqrt, scale, cast, scale.  Of each gate: product, silu, *.
    assert rows["fuse_rms_norm"].kernels == 5 * 7
    assert rows["fuse_gate_up"].kernels == 2 * 3
    assert rows["fuse_add_rms_norm"].kernels == rows["fuse_residual"].kernels == 2
    assert rows["fuse_rope_attention"].kernels == 2
    assert all(saving.seconds > 0 for saving in step.savings)


def test_packing_saves_what_is_not_stored(analysis, config_directory):
    """In decode, every matrix of weights is read as it is stored; in prefill only that of the few logits."""
    step = analysis.steps[0]
    (saved,) = (saving.bytes for saving in step.savings if saving.what == "lossless packing")
    D, V, width = 256, 80, 512
    matrices = 2 * [(2 * D, D), (D, D), (2 * width, D), (D, width)] + [(V, D)]
    assert saved == sum(2 * N * K - offsets(N, K)[2] for N, K in matrices)
    _, prefill = analyze(config_directory(), "cuda", [16], [256], H200).steps
    assert prefill.phase == "prefill"
    assert [s.bytes for s in prefill.savings if s.what == "lossless packing"] == [2 * V * D - offsets(V, D)[2]]
    assert [op.library for op in prefill.ops if op.label == "linear lm_head"] == [False]
    assert all(op.library for op in prefill.ops if op.label == "linear down_proj")
    plain = analyze(config_directory(), "cuda", [1], [8], H200, pack="none")
    assert plain.stored_bytes == plain.weight_bytes
    assert [s.bytes for s in plain.steps[0].savings if s.what == "lossless packing"] == [0]


def test_tiling_saves_the_scores(analysis):
    """Four heads; scores and probabilities are written and read, in two bytes."""
    for step in analysis.steps:
        queries = step.context if step.phase == "prefill" else 1
        length = step.context + (step.phase == "decode")
        scores = step.batch * 4 * queries * length * 2
        (saved,) = (saving.bytes for saving in step.savings if saving.what == "KV tiling")
        assert step.score_bytes == scores
        assert saved == 2 * 4 * scores


def test_long_contexts(config_directory):
    """To 256K positions: what tiling saves grows with the square of the context; what is beyond the model's is said."""
    lengths = [1 << 16, 1 << 17, 1 << 18]
    found = analyze(config_directory(max_position_embeddings=1 << 17), "cuda", [1], lengths, H200)
    saved = [step.savings[-1].bytes for step in found.steps if step.phase == "prefill"]
    assert [after / before for before, after in pairwise(saved)] == [4, 4]
    assert any("131,072 positions; a context of 262,144" in warning for warning in found.warnings)


def test_times(analysis):
    """A bound is never above the prediction; parts, operators and steps agree."""
    for step in analysis.steps:
        assert step.bound_ms <= step.predicted_ms
        assert sum(step.shares.values()) == pytest.approx(1)
        assert sum(op.predicted_us * op.times for op in step.ops) == pytest.approx(step.predicted_ms * 1e3)
        for op in step.ops:
            assert op.bound_us <= op.predicted_us
            assert op.memory_us + op.compute_us + op.launch_us == pytest.approx(op.predicted_us)
            assert (
                op.bound
                == max(
                    ("memory", op.memory_us), ("compute", op.compute_us), ("launch", op.launch_us), key=lambda p: p[1]
                )[0]
            )


def test_a_faster_chip_is_faster(config_directory):
    model = config_directory()
    half = replace(H200, sustained_bandwidth=H200.sustained_bandwidth / 2, launch=0.0, name="half")
    whole = replace(H200, launch=0.0)
    slow, fast = (analyze(model, "cuda", [1], [8], chip).steps[0] for chip in (half, whole))
    assert sum(op.memory_us for op in slow.ops) == pytest.approx(2 * sum(op.memory_us for op in fast.ops))


def test_json_is_plain_data(analysis):
    again = json.loads(json.dumps(analysis.to_json()))
    assert again["steps"][0]["ops"][0]["label"] == "embedding embed_tokens"
    assert again["blocks"] == analysis.blocks


def test_what_the_target_has_no_kernel_for_is_said(tmp_path):
    """Heads of 16 columns have no kernel on CUDA; they are counted all the same."""
    AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=160, n_positions=96).save_pretrained(
        tmp_path
    )
    found = analyze(tmp_path, "cuda", [1], [8], dtype="bfloat16")
    refused = "would be refused: target cuda has no kernel for paged_attention"
    assert any(refused in warning for warning in found.warnings)
    assert found.steps[0].predicted_ms > 0


@pytest.mark.parametrize(("target", "chip"), [("h100", None), ("cuda", "h100")])
def test_a_chips_own_kernels_are_counted(config_directory, target, chip, monkeypatch):
    asked = []
    monkeypatch.setattr(records, "find", lambda *call: asked.append(call[-1]))
    found = analyze(config_directory(), target, [1], [8], chip)
    assert found.chip == H100
    assert set(asked) == {"h100"}


def test_unknown_chip(config_directory):
    with pytest.raises(TargetError, match="target cuda has no chip 'h300'; it has: h200, h100"):
        analyze(config_directory(), "cuda", chip="h300")
