"""The imported module, run operator by operator, gives Hugging Face's logits."""

from copy import deepcopy

import pytest
import torch
from transformers.activations import ACT2FN
from tvm import relax

from tests import interpreter
from tests.models import KINDS, MAX_POSITIONS, config
from tests.relax_passes.harness import operators
from vllm_compile.accuracy import relative_error
from vllm_compile.errors import UnsupportedError
from vllm_compile.frontend.hf import trace
from vllm_compile.frontend.importer import import_model
from vllm_compile.frontend.torch_converters import CONVERTERS


def logits(pair, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and Hugging Face's for one prompt."""
    ours = interpreter.run(pair.imported.module, "main", *pair.arguments(ids))
    with torch.no_grad():
        return ours, pair.model(ids[None].long()).logits


def prompt(generator: torch.Generator, tokens: int = 29) -> torch.Tensor:
    return torch.randint(0, 80, (tokens,), generator=generator, dtype=torch.int32)


FLOAT32 = [kind for kind, options in KINDS.items() if "dtype" not in options]


@pytest.mark.parametrize("kind", FLOAT32)
def test_float32(kind, pairs, generator):
    """Sums of tens of terms in another order: some 2**-22 relative; of five layers up to 5e-6 was seen."""
    assert relative_error(*logits(pairs(kind), prompt(generator))) < 3e-5


def test_bfloat16(pairs, generator):
    """Rounded where Hugging Face rounds, but for attention, which keeps its scores in float32."""
    pair = pairs("bfloat16")
    prompts = [prompt(generator, MAX_POSITIONS) for _ in range(4)]
    ours, theirs = (torch.cat(parts) for parts in zip(*(logits(pair, ids) for ids in prompts), strict=True))
    wide = deepcopy(pair.model).float()
    exact = torch.cat([wide(ids[None].long()).logits.detach() for ids in prompts])
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert relative_error(ours, exact) <= 1.1 * relative_error(theirs, exact)


@pytest.mark.parametrize("broken", ["a weight", "a position"])
def test_a_broken_model_is_noticed(broken, pairs, generator):
    pair = pairs("two layers")
    arguments = pair.arguments(prompt(generator))
    right = interpreter.run(pair.imported.module, "main", *arguments)
    if broken == "a position":
        arguments[1] = arguments[1] * 2
    else:
        names = [p.name for p in pair.imported.module["main"].params]
        one, two = (names.index(f"model_layers_{i}_mlp_down_proj_weight") for i in (0, 1))
        arguments[one], arguments[two] = arguments[two], arguments[one]
    assert relative_error(interpreter.run(pair.imported.module, "main", *arguments), right) > 1e-2


def test_operators_keep_their_meaning(pairs):
    """Attention, linear layers, embeddings and boundaries are each one operator."""
    main = pairs("five layers").imported.module["main"]
    relax.analysis.well_formed(main)
    counted = operators(main)
    assert counted["causal_attention"] == 5
    assert counted["linear"] == 5 * 7 + 1
    assert counted["embedding"] == 3, "tokens, cosines, sines"
    assert counted["layer_boundary"] == 5 + 2
    assert not {"relax.matmul", "relax.nn.softmax", "relax.cos", "relax.sin"} & set(counted)


def test_every_value_is_of_the_models_dtype(pairs):
    """Outside the norms nothing of a bfloat16 model is computed in float32."""
    main = pairs("bfloat16").imported.module["main"]
    assert str(main.ret_ty.dtype) == "bfloat16"
    assert {str(p.ty.dtype) for p in main.params[2:]} == {"bfloat16"}


def test_parameters_are_the_checkpoints(pairs):
    imported = pairs("attention bias").imported
    names = dict(pairs("attention bias").model.named_parameters())
    assert set(imported.weights.values()) == set(names)
    parameters = {p.name: p.ty for p in imported.module["main"].params[2:]}
    assert parameters.keys() == imported.weights.keys() | imported.tables.keys()
    for parameter, name in imported.weights.items():
        assert [int(dim) for dim in parameters[parameter].shape.values] == list(names[name].shape)


KEPT = {
    "sum": lambda x: x * x.sum(-1, keepdim=True, dtype=torch.float32).to(x.dtype),
    "mean": lambda x: x * x.mean(-1, keepdim=True, dtype=torch.float32).to(x.dtype),
    "cumsum": lambda x: x.cumsum(-1, dtype=torch.float32).to(x.dtype),
    "cumprod": lambda x: x.cumprod(-1, dtype=torch.float32).to(x.dtype),
}


@pytest.fixture
def computing(monkeypatch):
    """`computing(function)`: a traced bfloat16 Llama of one layer that computes `function` instead of SiLU."""

    def traced(function):
        class Activation(torch.nn.Module):
            def forward(self, x):
                return function(x)

        monkeypatch.setitem(ACT2FN, "silu", Activation)
        return trace(config(num_hidden_layers=1), torch.bfloat16)

    return traced


@pytest.mark.parametrize("name", KEPT)
def test_a_converter_that_keeps_a_dtype_passes(name, computing):
    import_model(computing(KEPT[name]), MAX_POSITIONS)


@pytest.mark.parametrize(
    ("function", "operator", "reason"),
    [
        (
            lambda x: x.log_softmax(-1, dtype=torch.float32).to(x.dtype),
            "log_softmax.int",
            "it becomes bfloat16 .1, T, 72., the model has float32 .1, T, 72.",
        ),
        (lambda x: x + x[:, x.shape[1] - 1, None], "select.int", "its index depends on the number of tokens"),
    ],
    ids=["a dtype that TVM's drops", "an index"],
)
def test_a_node_that_cannot_be_converted_is_named(function, operator, reason, computing):
    """TVM's of log_softmax would be computed in bfloat16 where Hugging Face's is not."""
    named = rf"operator {operator} \(model.layers.0.mlp.act_fn\) .*: {reason}"
    with pytest.raises(UnsupportedError, match=named):
        import_model(computing(function), MAX_POSITIONS)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda x: relax.op.astype(x, "float16"), "becomes float16 .1, T, 72., the model has bfloat16"),
        (lambda x: relax.op.strided_slice(x, [2], [0], [71], [1]), "becomes bfloat16 .1, T, 71., .* .1, T, 72."),
        (lambda x: relax.op.squeeze(x, [0]), "becomes bfloat16 .T, 72., .* .1, T, 72."),
        (lambda x: relax.op.split(x, 2, axis=-1), "becomes 2 values, the model has 1"),
        (lambda x: relax.Tuple([]), "becomes 0 values, the model has 1"),
        (lambda x: relax.ShapeExpr([1, 72]), "becomes no tensor, the model has bfloat16 .1, T, 72."),
    ],
    ids=["dtype", "extent", "rank", "more", "fewer", "no tensor"],
)
def test_a_wrong_converter_is_found(broken, reason, monkeypatch, computing):
    def convert(node, importer):
        return importer.block_builder.emit(broken(importer.env[node.args[0]]))

    with monkeypatch.context() as patch:
        patch.setitem(CONVERTERS, "relu.default", convert)
        named = rf"operator relu.default \(model.layers.0.mlp.act_fn\) .*: it {reason}"
        with pytest.raises(UnsupportedError, match=named):
            import_model(computing(torch.relu), MAX_POSITIONS)
    import_model(computing(torch.relu), MAX_POSITIONS)


def test_unsupported_operator_is_named(monkeypatch):
    """An activation that TVM's importer does not know."""

    class Bessel(torch.nn.Module):
        def forward(self, x):
            return torch.special.i0e(x)

    monkeypatch.setitem(ACT2FN, "silu", Bessel)
    traced = trace(config(num_hidden_layers=1), torch.float32)
    with pytest.raises(UnsupportedError, match="i0e"):
        import_model(traced, MAX_POSITIONS)
