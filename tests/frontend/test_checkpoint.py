"""Safetensors read one tensor at a time, and random weights in their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_compile.errors import ModelError, UnsupportedError
from vllm_compile.frontend.checkpoint import INDEX, SINGLE, Checkpoint, DummyCheckpoint
from vllm_compile.frontend.conversion import open_checkpoint, weight_conversions

NAMES = ("embed.weight", "layer.0.weight", "layer.1.weight", "norm.weight")


@pytest.fixture
def tensors(generator) -> dict[str, torch.Tensor]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float32)
    return {name: torch.randn(5, 7, generator=generator).to(dtype) for name, dtype in zip(NAMES, dtypes, strict=True)}


@pytest.fixture
def single(tensors, tmp_path) -> Path:
    save_file(tensors, tmp_path / SINGLE)
    return tmp_path


@pytest.fixture
def sharded(tensors, tmp_path) -> Path:
    """Two tensors in each of two shards."""
    weight_map = {name: f"model-{i // 2 + 1:05d}-of-00002.safetensors" for i, name in enumerate(NAMES)}
    for shard in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_are_read_as_stored(layout, tensors, request):
    checkpoint = Checkpoint(request.getfixturevalue(layout))
    assert set(checkpoint.names()) == set(NAMES)
    for name, tensor in tensors.items():
        assert name in checkpoint
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert read.equal(tensor)


def test_what_was_read_survives_the_file(single, tensors):
    read = Checkpoint(single).read(NAMES[0])
    (single / SINGLE).write_bytes(b"\0" * 4096)
    assert read.equal(tensors[NAMES[0]])


def test_absent_tensor(single):
    checkpoint = Checkpoint(single)
    assert "lm_head.weight" not in checkpoint
    with pytest.raises(ModelError, match=r"no tensor named 'lm_head.weight'"):
        checkpoint.read("lm_head.weight")


def test_no_safetensors(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle, never opened")
    with pytest.raises(ModelError, match=r"neither model.safetensors nor .*--dummy-weights"):
        Checkpoint(tmp_path)


def test_shard_missing(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"shard missing: model-00002-of-00002\.safetensors"):
        Checkpoint(sharded)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["nothing", "half a header", "header", "all but a byte"])
def test_truncated(single, keep):
    path = single / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model.safetensors: cannot be read .*is the file whole"):
        Checkpoint(single)


@pytest.mark.parametrize(
    "text", ["", "no json", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'], ids=repr
)
def test_not_an_index(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(ModelError, match="not a safetensors index"):
        Checkpoint(sharded)


class TestDummyWeights:
    SHAPES = {"b.weight": (300, 40), "a.weight": (40, 300), "norm.weight": (64,)}  # noqa: RUF012

    def test_one_seed_gives_one_model(self):
        first, second = (DummyCheckpoint(self.SHAPES, torch.float32, seed=3) for _ in range(2))
        forwards = {name: first.read(name) for name in self.SHAPES}
        backwards = {name: second.read(name) for name in reversed(self.SHAPES)}
        for name in self.SHAPES:
            assert forwards[name].equal(backwards[name])
            assert forwards[name].equal(first.read(name)), "read twice"

    def test_order_of_the_shapes_does_not_matter(self):
        other = dict(reversed(self.SHAPES.items()))
        first, second = (DummyCheckpoint(shapes, torch.float32, seed=3) for shapes in (self.SHAPES, other))
        assert first.read("a.weight").equal(second.read("a.weight"))

    def test_tensors_and_seeds_differ(self):
        one, two = (DummyCheckpoint(self.SHAPES, torch.float32, seed=seed) for seed in (1, 2))
        assert not one.read("a.weight").equal(two.read("a.weight"))
        assert not one.read("a.weight").flatten().equal(one.read("b.weight").flatten())

    def test_values(self):
        checkpoint = open_checkpoint(Path("/nowhere"), self.SHAPES, torch.bfloat16, 5)
        matrix, vector = checkpoint.read("a.weight"), checkpoint.read("norm.weight")
        assert matrix.dtype == vector.dtype == torch.bfloat16
        assert vector.eq(1).all()
        # 12,000 samples: the standard deviation of the estimate is 0.02 / sqrt(24,000) = 0.00013
        assert matrix.float().std().item() == pytest.approx(0.02, abs=7e-4)
        assert matrix.float().mean().item() == pytest.approx(0.0, abs=1e-3)


def test_weights_of_another_kind_are_refused(tmp_path):
    """Even where config.json does not say that the checkpoint is quantised."""
    save_file({"w": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(UnsupportedError, match="w is stored as F8_E4M3: quantised"):
        Checkpoint(tmp_path).shape("w")


class TestConversion:
    """A tensor for each expert and projection, as Mixtral's checkpoints have them."""

    def conversions(self):
        settings = AutoConfig.for_model(
            "mixtral",
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=16,
            num_local_experts=12,
        )
        with torch.device("meta"):
            return weight_conversions(AutoModelForCausalLM.from_config(settings))

    def save(self, directory, **changes):
        prefix = "model.layers.0.block_sparse_moe"
        shapes = {"w1": (12, 8), "w2": (8, 12), "w3": (12, 8)}
        names = {f"{prefix}.experts.{e}.{w}.weight": shape for e in range(12) for w, shape in shapes.items()}
        tensors = {name: torch.randn(shape) for name, shape in names.items()}
        tensors[f"{prefix}.gate.weight"] = torch.randn(12, 8)
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in changes.items()}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / SINGLE)
        return tensors

    def test_experts_in_the_order_of_their_numbers(self, tmp_path):
        tensors = self.save(tmp_path)
        checkpoint = open_checkpoint(tmp_path, {}, torch.float32, None, self.conversions())
        name = "model.layers.0.mlp.experts.gate_up_proj"
        assert name in checkpoint
        assert checkpoint.shape(name) == (12, 24, 8)
        gate_up = checkpoint.read(name)
        for e in range(12):
            parts = [tensors[f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight"] for w in ("w1", "w3")]
            assert torch.equal(gate_up[e], torch.cat(parts))
        gate = checkpoint.read("model.layers.0.mlp.gate.weight")
        assert torch.equal(gate, tensors["model.layers.0.block_sparse_moe.gate.weight"])

    def test_an_expert_of_another_shape(self, tmp_path):
        self.save(tmp_path, **{"experts.3.w2.weight": torch.randn(8, 11)})
        checkpoint = open_checkpoint(tmp_path, {}, torch.float32, None, self.conversions())
        with pytest.raises(ModelError, match=r"tensors of model.layers.0.mlp.experts.down_proj do not fit together"):
            checkpoint.shape("model.layers.0.mlp.experts.down_proj")

    def test_a_missing_expert_shows_in_the_shape(self, tmp_path):
        self.save(tmp_path, **{"experts.11.w2.weight": None})
        checkpoint = open_checkpoint(tmp_path, {}, torch.float32, None, self.conversions())
        assert checkpoint.shape("model.layers.0.mlp.experts.down_proj") == (11, 8, 12)
