"""What a graph alone does not say: the configuration beside it, and which of the files there it is."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.onnx_models import GRAPH, VOCABULARY, build, llama, opened
from vllm_compile.errors import ModelError, UnsupportedError
from vllm_compile.model_files import find_files


class TestConfiguration:
    def test_from_the_builders(self, plain):
        model = opened(plain)
        assert model.config.model_type == "llama"
        fields = {name: model.fields[name] for name in ("num_hidden_layers", "hidden_size", "head_dim", "vocab_size")}
        assert fields == {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16, "vocab_size": VOCABULARY}
        assert (model.fields["num_attention_heads"], model.fields["num_key_value_heads"]) == (4, 2)
        assert (model.max_positions, model.fields["eos_token_id"]) == (96, 2)

    def test_from_the_models_own(self, plain, tmp_path):
        shutil.copy(tmp_path / "hf" / "config.json", plain)
        (plain / "genai_config.json").unlink()
        assert opened(plain).fields == json.loads((tmp_path / "hf" / "config.json").read_text())

    @pytest.mark.parametrize("field", ["num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"])
    def test_that_lies(self, field, plain, tmp_path):
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        (plain / "config.json").write_text(json.dumps(config | {field: 2 * config[field]}))
        with pytest.raises(
            ModelError, match=rf"config\.json: {field} is {2 * config[field]}, the graph.*{config[field]}"
        ):
            opened(plain)

    def test_none(self, plain):
        (plain / "genai_config.json").unlink()
        with pytest.raises(ModelError, match=r"neither genai_config\.json nor config\.json"):
            opened(plain)

    def test_that_is_no_json(self, plain):
        (plain / "genai_config.json").write_text("{")
        with pytest.raises(ModelError, match="not a configuration of ONNX Runtime GenAI"):
            opened(plain)

    @pytest.mark.parametrize("content", [{}, {"model": 3}, {"model": {"decoder": {"filename": "../model.onnx"}}}])
    def test_that_names_no_graph(self, content, plain):
        (plain / "genai_config.json").write_text(json.dumps(content))
        with pytest.raises(ModelError, match=r"genai_config\.json: "):
            opened(plain)

    @pytest.mark.parametrize(
        ("field", "value"), [("context_length", "many"), ("context_length", 0), ("bos_token_id", "many")]
    )
    def test_that_has_words_for_numbers(self, field, value, plain):
        genai = json.loads((plain / "genai_config.json").read_text())
        genai["model"][field] = value
        (plain / "genai_config.json").write_text(json.dumps(genai))
        with pytest.raises(ModelError, match=rf"genai_config\.json.*{field}"):
            opened(plain)

    def test_unknown_kind(self, plain):
        genai = json.loads((plain / "genai_config.json").read_text())
        genai["model"]["type"] = "decoder"
        (plain / "genai_config.json").write_text(json.dumps(genai))
        with pytest.raises(UnsupportedError, match=r"type decoder.*config\.json"):
            opened(plain)

    @pytest.mark.parametrize("provider", ["cuda", "dml"])
    def test_no_more_positions_than_angles(self, provider, tmp_path):
        plain = build(tmp_path, llama(), "fp16", provider)
        genai = json.loads((plain / "genai_config.json").read_text())
        genai["model"]["context_length"] = 4096
        (plain / "genai_config.json").write_text(json.dumps(genai))
        assert opened(plain, "float32").max_positions == 96


def test_the_file_or_its_directory(plain):
    for model in (plain, plain / GRAPH):
        assert find_files(model).graph == GRAPH
        assert find_files(model).directory == plain


def test_safetensors_come_first(plain, tmp_path):
    """A directory with both is Hugging Face's, with weights in its older format neither's; its graph can be named."""
    directory = tmp_path / "hf"
    shutil.copy(plain / GRAPH, directory)
    assert find_files(directory).graph is None
    assert find_files(directory / GRAPH).graph == GRAPH
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=rf"{GRAPH} or pytorch_model.bin, which is to be compiled"):
        find_files(directory)
    assert find_files(directory / GRAPH).graph == GRAPH
