"""Graphs of ONNX Runtime GenAI's builder, imported and run operator by operator, give ONNX Runtime's logits."""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from tvm import relax

from tests import interpreter, models
from tests.conftest import SEED
from tests.families import FAMILIES, random_model
from tests.onnx_models import (
    GRAPH,
    VOCABULARY,
    build,
    edit,
    logits,
    onnx,
    set_attribute,
    set_input,
    write_out_norms,
)
from tests.relax_passes.harness import operators
from vllm_compile.accuracy import relative_error
from vllm_compile.errors import ModelError, UnsupportedError, VllmCompileError
from vllm_compile.frontend.model import Model
from vllm_compile.frontend.onnx.operators import SKIP_EPSILON
from vllm_compile.frontend.read_model import read_model
from vllm_compile.model_files import find_files
from vllm_compile.relax_passes.base import Definitions
from vllm_compile.relax_passes.pipeline import run_passes

SIZES = {"hidden_size": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 96}
EOS = {"eos_token_id": 1}


def llama(**changes) -> PreTrainedModel:
    return models.llama(SEED, **SIZES | {"initializer_range": 0.15} | changes)


def family(name: str, **changes) -> PreTrainedModel:
    return random_model(name, **EOS | changes)


def another(kind: str, **changes) -> PreTrainedModel:
    """Of a family that tests/test_families.py has not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, kind, (kind, {}))
        return family(kind, **changes)


MODELS = {
    "Llama": llama,
    "Llama, one layer": partial(llama, num_hidden_layers=1),
    "Llama, five layers": partial(llama, num_hidden_layers=5),
    "Llama 3.2": partial(llama, tie_word_embeddings=True, **models.KINDS["llama3 rope"]),
    "Llama, biases": partial(llama, attention_bias=True, mlp_bias=True),
    "Gemma 2": partial(family, "Gemma 2"),
    "Granite": partial(family, "Granite"),
    "Nemotron": lambda: another("nemotron", hidden_size=128),
    "Phi": lambda: another("phi", hidden_size=128),
    "Phi-4-mini": partial(family, "Phi-4-mini", hidden_size=128, original_max_position_embeddings=96),
    "Qwen 2": partial(family, "Qwen 2"),
    "Qwen 3": partial(family, "Qwen 3"),
}
# A reduced cache, the builder's default, wants sequences as long as the window at least; attention is the same.
WHOLE_CACHE = {"windowed_kv_cache": "false"}
OPTIONS = {"Gemma 2": WHOLE_CACHE, "Qwen 2": WHOLE_CACHE}


@pytest.fixture
def ids(generator) -> torch.Tensor:
    """Longer than the sliding windows."""
    return torch.randint(3, VOCABULARY, (55,), generator=generator, dtype=torch.int32)


@pytest.fixture
def plain(tmp_path) -> Path:
    """A Llama's graph, to be damaged."""
    return build(tmp_path, llama())


def opened(directory: Path, dtype: str | None = None, **changes) -> Model:
    return read_model(find_files(directory), dtype, **{"dummy_seed": None} | changes)


def ours(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of the imported module, by the operators' references."""
    weights = [model.read(parameter.name) for parameter in model.module["main"].params[2:]]
    kinds = [getattr(torch, str(parameter.ty.dtype)) for parameter in model.module["main"].params[2:]]
    given = [weight.to(kind) for weight, kind in zip(weights, kinds, strict=True)]
    return interpreter.run(model.module, "main", ids, torch.arange(len(ids)), *given)[0]


@pytest.mark.parametrize("unfused", [False, True], ids=["packed", "unfused"])
@pytest.mark.parametrize("name", MODELS)
def test_float32(name, unfused, tmp_path, ids):
    """Sums of tens of terms in another order: some 2**-22 relative."""
    options = OPTIONS.get(name, {}) | ({"fuse_qkv": "false"} if unfused else {})
    directory = build(tmp_path, MODELS[name](), **options)
    assert relative_error(ours(opened(directory), ids), logits(directory, ids)) < 1e-5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Llama", lambda graph: set_attribute(graph, "GroupQueryAttention", "scale", 0.3)),
        ("Llama", lambda graph: set_attribute(graph, "SkipSimplifiedLayerNormalization", "epsilon", 0.1)),
        ("Llama", lambda graph: set_attribute(graph, "GroupQueryAttention", "rotary_interleaved", 1)),
        ("Llama", lambda graph: set_attribute(graph, "GroupQueryAttention", "do_rotary", 0)),
        ("Llama", lambda graph: set_attribute(graph, "GroupQueryAttention", "softcap", 2.0)),
        ("Llama", lambda graph: set_attribute(graph, "GroupQueryAttention", "local_window_size", 12)),
        ("Gemma 2", lambda graph: set_attribute(graph, "GroupQueryAttention", "local_window_size", 25)),
        ("Gemma 2", lambda graph: set_attribute(graph, "Gelu", "approximate", "none")),
    ],
    ids=["scale", "epsilon", "interleaved", "no rotation", "soft cap", "window", "window by one", "gelu"],
)
def test_attributes(name, change, tmp_path, ids):
    """Each one counts, here and in ONNX Runtime: the graph before is the negative control."""
    directory = build(tmp_path, MODELS[name](), **OPTIONS.get(name, {}))
    before = ours(opened(directory), ids)
    edit(directory, change)
    theirs = logits(directory, ids)
    assert relative_error(before, theirs) > 1e-4
    assert relative_error(ours(opened(directory), ids), theirs) < 1e-5


def test_an_epsilon_that_is_left_out():
    """What ONNX Runtime's own schemas say."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    skips = {"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}
    found = {schema.name: schema for schema in runtime.get_all_operator_schema() if schema.name in skips}
    assert found.keys() == skips
    for schema in found.values():
        default = onnx.AttributeProto.FromString(schema.attributes["epsilon"]._default_value)
        assert default.f == pytest.approx(SKIP_EPSILON)


def test_operators_that_no_builders_model_here_has(plain, ids):
    """In front of the second layer's product of gate and up; the graph before is the negative control."""
    before = ours(opened(plain), ids)

    def change(graph):
        place = next(i for i, node in enumerate(graph.node) if node.name == "/model/layers.1/mlp/Mul")
        x, node = graph.node[place].input[0], onnx.helper.make_node
        numbers = {"zero": [0], "middle": [36], "end": [2**31 - 1], "last": [2]}
        graph.initializer.extend(
            onnx.numpy_helper.from_array(np.asarray(values), name) for name, values in numbers.items()
        )
        chain = [
            node("Slice", [x, "zero", "middle", "last"], ["first"]),
            node("Slice", [x, "middle", "end", "last"], ["second"]),
            node("Concat", ["second", "first"], ["swapped"], axis=-1),
            node("Split", ["swapped"], ["one", "two", "three", "four"], axis=2, num_outputs=4),
            node("Sub", ["one", "two"], ["difference"]),
            node("Concat", ["difference", "two", "four", "three"], ["moved"], axis=2),
            node("Relu", ["moved"], ["positive"]),
            node("Neg", ["positive"], ["negative"]),
            node("Exp", ["negative"], ["shrunk"]),
            node("Sigmoid", ["shrunk"], ["gate"]),
            node("Sqrt", ["gate"], ["root"]),
            node("Identity", ["root"], ["result"]),
        ]
        graph.node[place].input[0] = "result"
        nodes = [*graph.node[:place], *chain, *graph.node[place:]]
        del graph.node[:]
        graph.node.extend(nodes)

    edit(plain, change)
    theirs = logits(plain, ids)
    assert relative_error(before, theirs) > 1e-2
    assert relative_error(ours(opened(plain), ids), theirs) < 1e-5


@pytest.mark.parametrize(
    ("reciprocal", "opset"), [(True, 22), (True, 13), (False, 22)], ids=["as Hugging Face", "axes given", "a quotient"]
)
def test_norms_that_are_written_out(reciprocal, opset, plain, ids):
    """In bfloat16 they are computed in float32 all the same, and are norms to the passes if they are Hugging Face's."""
    norms = opened(plain, "bfloat16")
    edit(plain, partial(write_out_norms, reciprocal=reciprocal, opset=opset))
    written = opened(plain, "bfloat16")
    ours_wide = ours(opened(plain), ids)
    if opset == 22:
        assert relative_error(ours_wide, logits(plain, ids)) < 1e-5
    one, other = ours(norms, ids), ours(written, ids)
    if reciprocal:
        assert torch.equal(one, other)
        assert run_passes(written.module)[1] == run_passes(norms.module)[1]
        return
    assert relative_error(other, one) < 2e-2, "some are rounded otherwise"
    computed = {
        (binding.value.op.name, str(binding.var.ty.dtype))
        for binding in Definitions(written.module["main"]).bindings
        if isinstance(binding.value, relax.Call)
        and binding.value.op.name in ("relax.mean", "relax.sqrt", "relax.divide")
    }
    assert computed == {(f"relax.{name}", "float32") for name in ("mean", "sqrt", "divide")}


def test_a_broken_weight_is_noticed(plain, ids):
    """Negative control: two tensors of one shape that have changed places."""
    theirs = logits(plain, ids)

    def swap(graph):
        one, two = (t for t in graph.initializer if t.name.endswith("o_proj.MatMul.weight"))
        one.name, two.name = two.name, one.name

    edit(plain, swap)
    assert relative_error(ours(opened(plain), ids), theirs) > 1e-2


def rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A float32 model whose weights are numbers of another dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["Llama", "Qwen 3"])
def test_sixteen_bits(name, precision, tmp_path, generator):
    """In bfloat16 no more than 1.1 times the error of Hugging Face's; the exact logits are ONNX Runtime's in fp32."""
    model = rounded(MODELS[name](), torch.bfloat16 if precision == "bf16" else torch.float16)
    exact_in, given = build(tmp_path, model), build(tmp_path, model, precision)
    prompts = [torch.randint(3, VOCABULARY, (90,), generator=generator, dtype=torch.int32) for _ in range(3)]
    exact = torch.cat([logits(exact_in, ids) for ids in prompts])
    narrow = opened(given, "bfloat16")
    result = torch.cat([ours(narrow, ids) for ids in prompts])
    assert result.dtype == torch.bfloat16
    model = model.bfloat16()
    with torch.no_grad():
        theirs = torch.cat([model(input_ids=ids[None].long()).logits[0] for ids in prompts])
    assert relative_error(result, exact) <= 1.1 * relative_error(theirs, exact)
    wide = torch.cat([ours(opened(given, "float32"), ids) for ids in prompts])
    assert relative_error(wide, exact) < 1e-2, "but for the angles, which the graph has in 16 bits"


@pytest.mark.parametrize("provider", ["cuda", "dml", "webgpu", "NvTensorRtRtx"])
@pytest.mark.parametrize("name", ["Llama", "Qwen 3"])
def test_providers(name, provider, tmp_path, ids):
    """The builder writes the same model in other operators: rotation, norms of q and k, and all norms apart, or not."""
    model = rounded(MODELS[name](), torch.float16)
    given = build(tmp_path, model, "fp16", provider)
    plain = build(tmp_path / "plain", model, "fp16", "webgpu", fuse_qk_norm_gqa="false")
    expected = opened(plain, "float32")
    assert torch.equal(ours(opened(given, "float32"), ids), ours(expected, ids))
    runs = (run_passes(model.module)[1] for model in (opened(given, "float32"), expected))
    counted, known = ({record.name: record.matches for record in records} for records in runs)
    same = ("fuse_rms_norm", "fuse_add_rms_norm", "fuse_rope_cache", "fuse_gate_up", "fuse_residual", "outline_layers")
    assert {n: counted[n] for n in same} == {n: known[n] for n in same}
    assert relative_error(ours(expected, ids), logits(plain, ids)) < 1e-2, "which computes in float16"


def test_float16_is_nearer_than_onnx_runtimes(tmp_path, ids):
    """Computed in float32, from weights and angles in 16 bits; ONNX Runtime has float16 throughout."""
    model = rounded(llama(), torch.float16)
    exact = logits(build(tmp_path, model), ids)
    given = build(tmp_path, model, "fp16")
    assert relative_error(ours(opened(given, "float32"), ids), exact) < relative_error(logits(given, ids), exact)


def test_the_same_layers_as_from_hugging_face(tmp_path):
    """Not fused by the builder: the same passes match as often, and the layer is the same function."""
    directory = build(tmp_path, llama(num_hidden_layers=5), fuse_qkv="false")
    module, records = run_passes(opened(directory).module)
    reference, expected = run_passes(opened(tmp_path / "hf").module)
    assert records == expected
    assert operators(module["layer_0"]) == operators(reference["layer_0"])
    layers = {var.name_hint for var in module.get_global_vars()}
    assert layers == {"forward", "logits", "weights", "layer_0"}


def test_tied_embeddings_are_one_parameter(tmp_path):
    directory = build(tmp_path, MODELS["Llama 3.2"]())
    assert len({p.name for p in opened(directory).module["main"].params if "embed" in p.name or "head" in p.name}) == 1


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


def test_names_that_the_compiler_gives(plain, ids):
    """Weights may be called like parameters of ours, and be told apart by a punctuation mark alone."""
    expected = ours(opened(plain), ids)
    others = {"model.layers.0.attn.o_proj.MatMul.weight": "kv_0", "model.layers.1.attn.o_proj.MatMul.weight": "kv.0"}
    others |= {"model.layers.0.mlp.up_proj.MatMul.weight": "position_table_0", "lm_head.MatMul.weight": "positions"}

    def change(graph):
        for tensor in graph.initializer:
            tensor.name = others.get(tensor.name, tensor.name)
        for node in graph.node:
            node.input[:] = [others.get(name, name) for name in node.input]

    edit(plain, change)
    model = opened(plain)
    assert torch.equal(ours(model, ids), expected)
    run_passes(model.module)


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


def test_tensors_in_the_graph_itself(plain, ids):
    """The builder keeps them beside it; others do not."""
    expected = ours(opened(plain), ids)
    onnx.save(onnx.load(plain / GRAPH), plain / GRAPH)
    (plain / f"{GRAPH}.data").unlink()
    assert torch.equal(ours(opened(plain), ids), expected)


def test_a_file_larger_than_memory(plain, ids):
    """Tensors are read one by one, each from its place: the last one is moved behind a hole of 4 TiB."""
    expected = ours(opened(plain), ids)
    data, hole = plain / f"{GRAPH}.data", 1 << 42

    def change(graph):
        place = {entry.key: entry for entry in graph.initializer[-1].external_data}
        offset, length = int(place["offset"].value), int(place["length"].value)
        with data.open("r+b") as file:
            file.seek(offset)
            content = file.read(length)
            file.seek(hole)
            file.write(content)
            file.seek(offset)
            file.write(bytes(length))
        place["offset"].value = str(hole)

    edit(plain, change)
    assert torch.equal(ours(opened(plain), ids), expected)


def test_dummy_weights(plain, ids):
    one, same, other = (ours(opened(plain, dummy_seed=seed), ids) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert relative_error(one, other) > 0.1
