"""What is computed from weights alone moves to a function of its own, run once at compile time."""

import pytest
import torch
from tvm import relax

from tests.relax_passes.harness import Served, operators
from vllm_compile.accuracy import relative_error
from vllm_compile.relax_passes.lift_weights import _split, lift_weights
from vllm_compile.relax_passes.pipeline import PIPELINE


def before_lifting(pair):
    module = pair.imported.module
    for transform in PIPELINE[: PIPELINE.index(lift_weights)]:
        module = transform(module)
    return module


@pytest.mark.parametrize("kind", ["two layers", "tied", "attention bias"])
def test_layers_keep_no_work_on_weights(kind, pairs, generator):
    before = before_lifting(pairs(kind))
    after = lift_weights(before)
    per_layer = 3 if kind == "attention bias" else 2
    assert operators(before["layer_0"])["relax.concat"] == per_layer
    assert operators(after["layer_0"])["relax.concat"] == 0
    assert operators(after["weights"]) == {"relax.concat": 2 * per_layer}
    ids = torch.randint(0, 80, (13,), generator=generator, dtype=torch.int32)
    logits = [Served(module, pairs(kind)).prompt(ids) for module in (before, after)]
    assert logits[1].equal(logits[0])


def test_what_depends_on_the_input_stays(pairs):
    before = before_lifting(pairs("two layers"))
    after = lift_weights(before)
    kept = operators(before["layer_0"]) - operators(after["layer_0"])
    assert kept == {"relax.concat": 2}
    for name in ("forward", "logits"):
        assert operators(before[name]) == operators(after[name])


def test_stored_names_are_the_parameters(pairs):
    after = lift_weights(before_lifting(pairs("tied")))
    stored = [str(name) for name in after["weights"].attrs["stored"]]
    wanted = [p.name for name in ("forward", "logits") for p in after[name].params]
    assert len(stored) == len(set(stored))
    assert set(stored) == set(wanted[wanted.index("slot_mapping") + 1 :]) - {"hidden"}
    embedding = {"model_embed_tokens_weight", "lm_head_weight"} & set(stored)
    assert len(embedding) == 1, "the embedding and the head share it"


def test_merged_weights_are_named_after_their_sources(pairs):
    after = lift_weights(before_lifting(pairs("attention bias")))
    layer = [p.name for p in after["layer_0"].params]
    assert {"model_self_attn_q_k_v_proj_weight", "model_self_attn_q_k_v_proj_bias"} < set(layer)
    assert "model_mlp_gate_up_proj_weight" in layer
    stored = [str(name) for name in after["weights"].attrs["stored"]]
    assert {f"model_layers_{i}_self_attn_q_k_v_proj_weight" for i in range(2)} < set(stored)


def test_a_name_that_is_taken_gets_a_number():
    """One weight scaled, and plain beside it."""
    x, w = (relax.Var(name, relax.TensorType([4], "float32")) for name in ("x", "w"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w]):
        with builder.dataflow():
            scaled = builder.emit(relax.op.multiply(w, w))
            y = builder.emit_output(builder.emit(relax.op.add(relax.op.multiply(x, scaled), w)))
        builder.emit_func_output(y)
    split = _split(builder.get()["main"], {w}, {"w"})
    assert list(split.frontier.values()) == ["w_2", "w"]


def test_a_swapped_weight_is_noticed(pairs, generator):
    """Negative control of the comparison above."""
    served = Served(lift_weights(before_lifting(pairs("two layers"))), pairs("two layers"))
    ids = torch.randint(0, 80, (13,), generator=generator, dtype=torch.int32)
    right = served.prompt(ids)
    names = [f"model_layers_{layer}_self_attn_o_proj_weight" for layer in (0, 1)]
    first, second = (served.weights[name] for name in names)
    served.weights |= {names[0]: second, names[1]: first}
    assert relative_error(served.prompt(ids), right) > 1e-2
