"""A model directory that cannot be compiled says why, and none of its code is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tests.models import config
from vllm_compile.errors import ModelError, UnsupportedError, VllmCompileError
from vllm_compile.frontend.hf import decoder_layers, read_config, trace


@pytest.fixture
def directory(tmp_path) -> Path:
    """A Llama's config.json."""
    config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return tmp_path


def change(directory: Path, **fields) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_reads_a_config(directory):
    assert read_config(directory).hidden_size == 48


def test_missing_directory(tmp_path):
    with pytest.raises(ModelError, match="no such model directory"):
        read_config(tmp_path / "absent")


def test_file_instead_of_a_directory(directory):
    with pytest.raises(ModelError, match="no such model directory"):
        read_config(directory / "config.json")


def test_no_config(tmp_path):
    with pytest.raises(ModelError, match=r"config.json cannot be read .No such file"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b'"llama"'], ids=repr)
def test_not_a_config(directory, content):
    (directory / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config.json: not "):
        read_config(directory)


@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_attention_heads": 5}, {"num_hidden_layers": -1}],
    ids=str,
)
def test_senseless_fields(directory, fields):
    change(directory, **fields)
    with pytest.raises(VllmCompileError) as caught:
        trace(read_config(directory), torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "architecture"), [("t5", "T5ForConditionalGeneration"), ("clip", "CLIPModel"), ("nothing", "MyModel")]
)
def test_unsupported_architecture_is_named(directory, kind, architecture):
    change(directory, model_type=kind, architectures=[architecture])
    with pytest.raises(UnsupportedError, match=f"architecture {architecture} is not a causal"):
        read_config(directory)


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("mamba", {}, "state-space"),
        ("gpt_neo", {"attention_types": [[["global"], 2]], "num_layers": 2}, "attention by code of the model.s own"),
        ("bloom", {}, "attention by code of the model.s own"),
        ("falcon", {"alibi": True}, "ALiBi position biases"),
        ("gptj", {"rotary_dim": 8}, "attention by code of the model.s own"),
        ("bart", {"is_encoder_decoder": True}, "encoder-decoder"),
        ("qwen3_next", {"head_dim": 8, "num_key_value_heads": 2}, "linear_attention"),
        ("llama", {"rope_parameters": {"rope_type": "sideways", "rope_theta": 1e4}}, "RoPE of type sideways"),
    ],
)
def test_unsupported_models_are_named(kind, options, words):
    """With what is supported, in one line."""
    settings = AutoConfig.for_model(kind, **SIZES | options)
    with pytest.raises(UnsupportedError, match=f"(?i){words}.*supported") as caught:
        trace(settings, torch.float32)
    assert "\n" not in str(caught.value)


def test_models_with_vision_are_refused():
    settings = config()
    settings.vision_config = {"hidden_size": 8}
    with pytest.raises(UnsupportedError, match="vision are not supported"):
        trace(settings, torch.float32)


def test_what_cannot_be_traced_is_named():
    """XGLM looks positions up in a table that is no parameter."""
    sizes = {"d_model": 32, "ffn_dim": 32, "num_layers": 1, "attention_heads": 2, "vocab_size": 48}
    with pytest.raises(UnsupportedError, match=r"XGLMForCausalLM .*, in model\.embed_positions: ") as caught:
        trace(AutoConfig.for_model("xglm", **sizes), torch.float32)
    assert "\n" not in str(caught.value)


def test_window_as_long_as_the_model_is_none():
    settings = AutoConfig.for_model("mistral", **SIZES, num_key_value_heads=2, sliding_window=64)
    assert trace(settings, torch.float32).shapes


def test_code_of_a_checkpoint_is_never_run(directory):
    """`auto_map` names a file that leaves a mark when it is imported."""
    marker = directory / "was_run"
    (directory / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: ...\n")
    names = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")}
    change(directory, auto_map=names, trust_remote_code=True)
    trace(read_config(directory), torch.float32)
    assert not marker.exists()
    change(directory, model_type="evil")
    with pytest.raises(UnsupportedError):
        read_config(directory)
    assert not marker.exists()


def test_tracing_makes_no_weights():
    """A model of 500 GB."""
    huge = config(hidden_size=32768, intermediate_size=131072, num_attention_heads=256, vocab_size=262144)
    traced = trace(huge, torch.bfloat16)
    assert traced.shapes["model.layers.1.mlp.up_proj.weight"] == (131072, 32768)
    assert all(parameter.is_meta for parameter in traced.program.parameters())


def test_aliases_of_tied_weights():
    names = ("lm_head.weight", "model.embed_tokens.weight")
    tied, untied = (trace(config(tie_word_embeddings=tie), torch.float32) for tie in (True, False))
    short = "embed_tokens.weight"  # a checkpoint of the model without its head
    assert [set(tied.aliases[name]) for name in names] == [{*names, short}] * 2
    assert [untied.aliases[name] for name in names] == [(names[0],), (names[1], short)]


def test_decoder_layers():
    settings = config(num_hidden_layers=3)
    layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    model = torch.nn.Module()
    with pytest.raises(UnsupportedError, match="found 0 lists"):
        decoder_layers(model, settings)
    model.layers = layers
    assert decoder_layers(model, settings) is layers
    model.encoder = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    with pytest.raises(UnsupportedError, match="found 2 lists"):
        decoder_layers(model, settings)
