"""Graphs that are not supported, or damaged: what is wrong is named, with its place."""

from __future__ import annotations

import re
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.onnx_models import GRAPH, build, edit, llama, onnx, opened, set_attribute, set_input
from vllm_compile.errors import ModelError, UnsupportedError, VllmCompileError

ATTENTION = "/model/layers.0/attn/GroupQueryAttention"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (partial(set_attribute, op="GroupQueryAttention", name="smooth_softmax", value=1), "smooth_softmax 1"),
        (partial(set_attribute, op="GroupQueryAttention", name="k_quant_type", value="PER_TENSOR"), "PER_TENSOR"),
        (partial(set_attribute, op="GroupQueryAttention", name="novelty", value=1), "novelty"),
        (
            partial(set_attribute, op="GroupQueryAttention", name="kv_num_heads", value=3),
            "values for each token are not",
        ),
        (partial(set_input, op="GroupQueryAttention", index=9, name="attention_mask"), "positions attention_mask"),
        (partial(set_input, op="GroupQueryAttention", index=10, name="attention_mask"), "attention_bias"),
        (partial(set_input, op="GroupQueryAttention", index=11, name="attention_mask"), "head_sink"),
        (partial(set_input, op="GroupQueryAttention", index=3, name="past_key_values.1.key"), "shared with"),
        (partial(set_input, op="GroupQueryAttention", index=4, name="past_key_values.1.value"), "shared with"),
        (partial(set_input, op="GroupQueryAttention", index=4, name="past_key_values.0.key"), "both past_key_values.0"),
        (partial(set_input, op="GroupQueryAttention", index=5, name="past_key_values.1.key"), "lengths that depend"),
        (partial(set_input, op="GroupQueryAttention", index=7, name="attention_mask"), "angles attention_mask"),
    ],
)
def test_what_attention_does_not_do_is_named(change, what, plain):
    edit(plain, lambda graph: change(graph))
    with pytest.raises(UnsupportedError, match=f"{ATTENTION} .*layer 0.*{what}"):
        opened(plain)


def test_an_operator_that_is_not_known_is_named(plain):
    def change(graph):
        node = next(node for node in graph.node if node.name == "/model/layers.1/mlp/act_fn/Sigmoid")
        node.op_type = "HardSigmoid"

    edit(plain, change)
    where = "HardSigmoid /model/layers.1/mlp/act_fn/Sigmoid (behind the attention of layer 1)"
    with pytest.raises(UnsupportedError, match=re.escape(where)):
        opened(plain)


@pytest.mark.parametrize("axes", [[0, 2, 1], [1, 0, 2], None])
def test_a_transposition_that_moves_tokens_is_named(axes, plain):
    """In front of the second layer's product of gate and up, there and back."""

    def change(graph):
        place = next(i for i, node in enumerate(graph.node) if node.name == "/model/layers.1/mlp/Mul")
        x = graph.node[place].input[0]
        given = {} if axes is None else {"perm": axes}
        there, back = (onnx.helper.make_node("Transpose", [a], [b], name=b, **given) for a, b in ((x, "t"), ("t", "b")))
        graph.node[place].input[0] = "b"
        graph.node.insert(place, back)
        graph.node.insert(place, there)

    edit(plain, change)
    with pytest.raises(UnsupportedError, match=r"Transpose t .*layer 1.*tokens are batched as they come"):
        opened(plain)


def test_an_operator_of_another_domain_is_another(tmp_path):
    """ONNX has a RotaryEmbedding of its own, whose inputs are in another order."""
    directory = build(tmp_path, llama(), "fp16", "dml")

    def change(graph):
        next(node for node in graph.node if node.op_type == "RotaryEmbedding").domain = ""

    edit(directory, change)
    with pytest.raises(UnsupportedError, match=r"RotaryEmbedding /model/layers\.0/.*of ONNX is not supported"):
        opened(directory, "float32")


def test_a_mask_that_is_read_elsewhere(plain):
    edit(plain, partial(set_input, op="Mul", index=1, name="attention_mask"))
    with pytest.raises(UnsupportedError, match=r"act_fn/Mul .*attention_mask cannot be an operand"):
        opened(plain)


def test_layers_that_are_not_one_behind_the_other(plain):
    """The last norm reads the embedding too: nothing between the layers is all that what follows depends on."""

    def change(graph):
        norm = next(node for node in graph.node if "final_norm" in node.name)
        norm.input[0] = "/model/embed_tokens/Gather/output_0"

    edit(plain, change)
    with pytest.raises(UnsupportedError, match=rf"{GRAPH}: no hidden states before the attention of layer 1"):
        opened(plain)


def test_quantised_weights(tmp_path):
    directory = build(tmp_path, llama(), "int4")
    with pytest.raises(UnsupportedError, match=r"MatMulNBits /model/layers\.0/\S+ .*layer 0.*quantised.*fp32, fp16"):
        opened(directory)


def test_attention_of_another_kind(tmp_path):
    """What the builder writes for CUDA in fp32."""
    with pytest.raises(UnsupportedError, match=r"its attention is Attention; GroupQueryAttention is supported"):
        opened(build(tmp_path, llama(), provider="cuda"))


def test_float16_is_not_computed_in(tmp_path):
    with pytest.raises(UnsupportedError, match="float16 is not supported; pass --dtype"):
        opened(build(tmp_path, llama(), "fp16"))


def _cut(directory: Path) -> None:
    data = directory / f"{GRAPH}.data"
    data.write_bytes(data.read_bytes()[:-4])


def _elsewhere(directory: Path) -> None:
    def change(graph):
        next(e for e in graph.initializer[1].external_data if e.key == "location").value = "../secret"

    edit(directory, change)


def _nowhere(directory: Path) -> None:
    def change(graph):
        data = graph.initializer[1].external_data
        data.remove(next(entry for entry in data if entry.key == "location"))

    edit(directory, change)


def _negative(directory: Path) -> None:
    def change(graph):
        next(e for e in graph.initializer[0].external_data if e.key == "length").value = "-12"

    edit(directory, change)


def _wrong_length(directory: Path) -> None:
    def change(graph):
        next(e for e in graph.initializer[0].external_data if e.key == "length").value = "12"

    edit(directory, change)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda directory: (directory / f"{GRAPH}.data").unlink(), r"model\.onnx\.data: missing"),
        (_cut, r"model\.onnx\.data: too short for lm_head"),
        (_elsewhere, r"'\.\./secret', outside the model's directory"),
        (_nowhere, "kept beside the graph, but not in which file"),
        (_negative, "-12 bytes from 0 on"),
        (_wrong_length, "bytes by its shape, 12 by its entry"),
        (lambda directory: (directory / GRAPH).write_bytes(b"not a graph"), "not an ONNX file"),
        (lambda directory: (directory / GRAPH).write_bytes(b""), "not an ONNX file"),
        (lambda directory: (directory / GRAPH).unlink(), "cannot be read"),
    ],
)
def test_damaged_files(damage, what, plain):
    damage(plain)
    with pytest.raises(ModelError, match=what):
        opened(plain)


def test_an_old_opset(plain):
    graph = onnx.load(plain / GRAPH, load_external_data=False)
    next(entry for entry in graph.opset_import if not entry.domain).version = 11
    onnx.save(graph, plain / GRAPH)
    with pytest.raises(UnsupportedError, match="opset 11"):
        opened(plain)


def test_without_the_package(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(VllmCompileError, match=r"needs the package onnx; pip install 'vllm-compile\[onnx\]'"):
        opened(plain)
