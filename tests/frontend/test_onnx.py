"""Graphs of ONNX Runtime GenAI's builder, imported and run operator by operator, give ONNX Runtime's logits."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from tvm import relax

from tests import interpreter, models
from tests.families import FAMILIES, random_model
from tests.onnx_models import (
    GRAPH,
    VOCABULARY,
    build,
    edit,
    llama,
    logits,
    onnx,
    opened,
    set_attribute,
    write_out_norms,
)
from tests.relax_passes.harness import operators
from vllm_compile.accuracy import relative_error
from vllm_compile.frontend.model import Model
from vllm_compile.frontend.onnx.operators import SKIP_EPSILON
from vllm_compile.relax_passes.base import Definitions
from vllm_compile.relax_passes.pipeline import run_passes

EOS = {"eos_token_id": 1}


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
