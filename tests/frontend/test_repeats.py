"""Layers that repeat an earlier one are traced once, and come out as if they had been traced each."""

from __future__ import annotations

import pytest
import torch
import tvm_ffi
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.models import config
from vllm_compile.frontend import hf
from vllm_compile.frontend.importer import import_model

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 80,
    "max_position_embeddings": 64,
    "sliding_window": 8,
}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "llama": ({}, {1: 0, 2: 0, 3: 0}),
    "qwen3": ({}, {1: 0, 2: 0, 3: 0}),
    "gemma2": ({}, {2: 0, 3: 1}),
    "gemma3_text": ({"layer_types": SLIDING}, {1: 0, 3: 0}),  # each kind of layer has RoPE of its own
    "gpt2": ({}, {1: 0, 2: 0, 3: 0}),
    "phi3": ({"pad_token_id": 0}, {1: 0, 2: 0, 3: 0}),
}


@pytest.fixture
def found(monkeypatch):
    """What `find_repeats` finds in each trace, in turn."""
    answers, find = [], hf.find_repeats

    def spy(*arguments):
        answers.append(find(*arguments))
        return answers[-1]

    monkeypatch.setattr(hf, "find_repeats", spy)
    return answers


def imported(settings):
    return import_model(hf.trace(settings, torch.float32), settings.max_position_embeddings)


@pytest.mark.parametrize("kind", FAMILIES)
def test_as_if_each_layer_had_been_traced(kind, found, monkeypatch):
    changes, expected = FAMILIES[kind]
    once, each, deeper = (AutoConfig.for_model(kind, **SIZES | changes) for _ in range(3))
    short = imported(once)
    assert found == [expected]
    monkeypatch.setattr(hf, "find_repeats", lambda *_: {})
    full = imported(each)
    assert tvm_ffi.structural_equal(short.module, full.module, map_free_vars=True)
    assert [p.name for p in short.module["main"].params] == [p.name for p in full.module["main"].params]
    assert short.weights == full.weights
    assert all(table.equal(full.tables[name]) for name, table in short.tables.items())
    deeper.num_hidden_layers, deeper.layer_types = 5, [*SLIDING, "full_attention"]
    assert not tvm_ffi.structural_equal(short.module, imported(deeper).module, map_free_vars=True)


def test_constants_tell_layers_apart(found):
    """GPT-2 may divide the scores of each layer by its number."""
    hf.trace(AutoConfig.for_model("gpt2", **SIZES, scale_attn_by_inverse_layer_idx=True), torch.float32)
    assert found == [{}]


def test_model_that_looks_at_values(found):
    """With a padding token, GPT-2 looks for it among the ids, but for when it is traced."""
    settings = AutoConfig.for_model("gpt2", **SIZES, pad_token_id=0)
    assert hf.trace(settings, torch.float32).shapes
    assert found == [{}]


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        (lambda mlp, x: x * 1.0, True),
        (lambda mlp, x: x * (1.0 + mlp.number), False),
        (lambda mlp, x: x if mlp.number < 2 else x.relu(), False),
        (lambda mlp, x: x * mlp.scale, False),
        (lambda mlp, x: x + (mlp.up_proj if mlp.number < 2 else mlp.gate_proj).weight[0, :1], False),
    ],
    ids=["same constant", "another constant", "another operator", "a buffer of its own", "another weight"],
)
def test_what_a_layer_makes_of_its_number(change, alike, found, monkeypatch):
    inner, init = LlamaMLP.forward, LlamaMLP.__init__
    made = []

    def numbered(self, settings):
        init(self, settings)
        self.number = len(made)
        self.scale = torch.full((), float(self.number), device="cpu")
        made.append(self)

    monkeypatch.setattr(LlamaMLP, "__init__", numbered)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: inner(self, change(self, x)))
    hf.trace(config(num_hidden_layers=4), torch.float32)
    assert (found == [{1: 0, 2: 0, 3: 0}]) == alike


def test_export_does_not_grow_with_depth(monkeypatch):
    inner, symbolic = LlamaMLP.forward, []

    def count(self, x):
        symbolic.append(not isinstance(x.shape[1], int))
        return inner(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", count)
    for layers in (2, 7):
        symbolic.clear()
        hf.trace(config(num_hidden_layers=layers), torch.float32)
        assert symbolic.count(True) == 1
        assert symbolic.count(False) == layers, "each is run once on meta tensors"
