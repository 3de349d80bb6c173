"""All passes in order, on Llamas of many kinds."""

import pytest
import torch
from tvm import relax

from tests import interpreter
from tests.models import KINDS
from tests.relax_passes.harness import Served, own_operators
from vllm_compile.accuracy import relative_error
from vllm_compile.relax_passes.pipeline import IF_SERVED, passes_for, run_passes

LAYER = {
    "rms_norm": 1,
    "linear": 3,
    "qkv_rope_cache": 1,
    "paged_attention": 1,
    "add_rms_norm": 1,
    "gate_up_silu": 1,
}


def tolerance(dtype: str) -> float:
    """In float32 merged products add in another order; in bfloat16 that may move a rounding, and the
    layers behind it make up to one step of 2**-8 in each of a few values of it."""
    return {"float32": 3e-5, "bfloat16": 2e-2}[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_keeps_the_logits(kind, pairs, generator):
    pair = pairs(kind)
    ids = torch.randint(0, 80, (19,), generator=generator, dtype=torch.int32)
    expected = interpreter.run(pair.imported.module, "main", *pair.arguments(ids))[0]

    def check(name, module):
        relax.analysis.well_formed(module)
        error = relative_error(Served(module, pair).prompt(ids, chunk=8), expected)
        assert error < tolerance(KINDS[kind].get("dtype", "float32")), name

    run_passes(pair.imported.module, check, set(IF_SERVED.values()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mlp bias"])
def test_structure_does_not_depend_on_the_kind(kind, pairs):
    module, records = run_passes(pairs(kind).imported.module)
    assert {var.name_hint for var in module.get_global_vars()} == {"forward", "layer_0", "logits", "weights"}
    assert own_operators(module["layer_0"]) == LAYER
    depth = KINDS[kind].get("num_hidden_layers", 2)
    moved = 3 if kind == "attention bias" else 2
    assert {record.name: record.matches for record in records} == {
        "page_kv_cache": depth,
        "absorb_latent": 0,
        "outline_layers": depth,
        "fuse_layer_norm": 0,
        "fuse_rms_norm": 3,
        "fuse_gate_up": 1,
        "route_experts": 0,
        "merge_qkv": 1,
        "fuse_rope_cache": 1,
        "fuse_add_rms_norm": 1,
        "fuse_residual": 1,
        "lift_weights": moved * depth,
        "fuse_elementwise": 0,
    }


def test_a_pass_without_a_match_is_counted(pairs):
    _, records = run_passes(pairs("mlp bias").imported.module)
    assert [record.name for record in records] == [transform.info.name for transform in passes_for()]
    assert [record.name for record in records if record.matches == 0] == [
        "absorb_latent",
        "fuse_layer_norm",
        "fuse_gate_up",
        "route_experts",
    ]


def test_deterministic(pairs):
    scripts = {run_passes(pairs("two layers").imported.module)[0].script() for _ in range(2)}
    assert len(scripts) == 1
