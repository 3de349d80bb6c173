"""A mixture of experts becomes its router and two linear layers of experts."""

import pytest
import torch
from tvm import relax

from tests.relax_passes.harness import TOKENS, Shape, apply, module, own_operators
from vllm_compile.ops import LIMIT_GROUPS, MOE, ROUTE
from vllm_compile.ops.base import attributes_of
from vllm_compile.relax_passes.base import Definitions
from vllm_compile.relax_passes.route_experts import route_experts

EXPERTS, TOP_K, WIDTH, INNER = 5, 3, 8, 12
SHAPES: dict[str, Shape] = {
    "x": ("T", WIDTH),
    "logits": ("T", EXPERTS),
    "gate_up": (EXPERTS, 2 * INNER, WIDTH),
    "down": (EXPERTS, WIDTH, INNER),
}
ROUTED = {"route": 1, "expert_gate_up_silu": 1, "expert_linear": 1}


def mixture(
    emit,
    x,
    logits,
    gate_up,
    down,
    normalise=True,
    scores_dtype="float32",
    largest=True,
    other=None,
    wide="float32",
    scale=None,
    groups=None,
):
    """As Mixtral writes it; DeepSeek-V2 multiplies scores by a constant, and chooses from the best groups."""

    def cast(value, dtype):
        return value if str(value.ty.dtype) == dtype else emit(relax.op.astype(value, dtype))

    probabilities = emit(relax.op.nn.softmax(cast(logits, wide), axis=-1))
    if groups is not None:
        probabilities = emit(LIMIT_GROUPS({"scores": probabilities}, **groups))
    top = emit(relax.op.topk(probabilities, TOP_K, axis=-1, largest=largest, ret_type="both", dtype="int64"))
    values, experts = emit(relax.TupleGetItem(top, 0)), emit(relax.TupleGetItem(top, 1))
    if normalise:
        summed = values if other is None else cast(other, "float32")
        values = emit(relax.op.divide(values, emit(relax.op.sum(summed, axis=[-1], keepdims=True))))
    if scale is not None:
        values = emit(relax.op.multiply(values, relax.const(scale, "float32")))
    inputs = {"x": x, "experts": experts, "scores": cast(values, scores_dtype), "gate_up": gate_up, "down": down}
    return emit(MOE(inputs))


@pytest.mark.parametrize(
    ("dtype", "scores_dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
)
@pytest.mark.parametrize(("normalise", "scale"), [(True, None), (False, None), (False, 16.0), (True, 2.5)])
def test_routed(dtype, scores_dtype, normalise, scale, generator):
    def build(emit, *inputs):
        return mixture(emit, *inputs, normalise=normalise, scores_dtype=scores_dtype, scale=scale)

    # No two alike: which of equal logits torch.topk takes is not defined.
    logits = torch.stack([torch.randperm(EXPERTS, generator=generator) for _ in range(TOKENS)]).to(
        getattr(torch, dtype)
    )
    after, matches = apply(route_experts, module(build, dtype, **SHAPES), generator, logits=logits)
    assert matches == 1
    assert own_operators(after) == ROUTED


@pytest.mark.parametrize(("kept", "matched"), [(3, 1), (2, 0)], ids=["enough", "too few"])
def test_groups_of_experts(kept, matched, generator):
    """Of groups with fewer experts than are chosen, the rest is anyone's."""

    def build(emit, *inputs):
        return mixture(emit, *inputs, normalise=False, groups={"groups": EXPERTS, "kept": kept})

    after, matches = apply(route_experts, module(build, **SHAPES), generator)
    assert matches == matched
    routes = [c for c in (b.value for b in Definitions(after).bindings) if ROUTE.matches(c)]
    assert [(attributes_of(c)["groups"], attributes_of(c)["kept"]) for c in routes] == [(EXPERTS, kept)] * matched


def chosen_by_sums(emit, x, logits, bias, gate_up, down, kind="sigmoid", gathered="scores", added=1e-20):
    """As DeepSeek-V3 writes it: the bias decides who is chosen, not how much it counts."""
    op = {"sigmoid": relax.op.sigmoid, "softmax": relax.op.nn.softmax}[kind]
    scores = emit(op(logits))
    sums = emit(relax.op.add(scores, bias))
    limited = emit(LIMIT_GROUPS({"scores": sums}, groups=EXPERTS, kept=4, best=1))
    top = emit(relax.op.topk(limited, TOP_K, axis=-1, largest=True, ret_type="both", dtype="int64"))
    experts = emit(relax.TupleGetItem(top, 1))
    values = emit(relax.op.gather_elements({"scores": scores, "sums": sums}[gathered], experts, axis=1))
    total = emit(relax.op.sum(values, axis=[-1], keepdims=True))
    values = emit(relax.op.divide(values, emit(relax.op.add(total, relax.const(added, "float32")))))
    return emit(MOE({"x": x, "experts": experts, "scores": values, "gate_up": gate_up, "down": down}))


BIASED: dict[str, Shape] = {"x": ("T", WIDTH), "logits": ("T", EXPERTS), "bias": (EXPERTS,), **SHAPES}


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_chosen_by_sums_of_score_and_bias(kind, generator):
    def build(emit, *inputs):
        return chosen_by_sums(emit, *inputs, kind=kind, added=0.25)

    after, matches = apply(route_experts, module(build, **BIASED), generator)
    assert matches == 1
    (route,) = [b.value for b in Definitions(after).bindings if ROUTE.matches(b.value)]
    assert attributes_of(route).get("sigmoid", 0) == (kind == "sigmoid")
    assert attributes_of(route)["epsilon"] == 0.25


def test_scores_with_the_bias(generator):
    def build(emit, *inputs):
        return chosen_by_sums(emit, *inputs, gathered="sums")

    _, matches = apply(route_experts, module(build, **BIASED), generator)
    assert matches == 0


def test_softmax_of_those_chosen(generator):
    """As Granite writes it: the same as dividing by their sum."""

    def build(emit, x, logits, gate_up, down):
        top = emit(relax.op.topk(logits, TOP_K, axis=-1, largest=True, ret_type="both", dtype="int64"))
        values, experts = emit(relax.TupleGetItem(top, 0)), emit(relax.TupleGetItem(top, 1))
        scores = emit(relax.op.nn.softmax(values, axis=-1))
        return emit(MOE({"x": x, "experts": experts, "scores": scores, "gate_up": gate_up, "down": down}))

    after, matches = apply(route_experts, module(build, **SHAPES), generator)
    assert matches == 1
    assert own_operators(after) == ROUTED


@pytest.mark.parametrize("changes", [{"largest": False}, {"other": True}], ids=["the least likely", "another sum"])
def test_routers_of_another_kind(changes, generator):
    def build(emit, x, logits, gate_up, down):
        given = {**changes, "other": logits} if "other" in changes else changes
        return mixture(emit, x, logits, gate_up, down, **given)

    after, matches = apply(route_experts, module(build, **SHAPES), generator)
    assert matches == 0
    assert own_operators(after) == {"moe": 1}


def test_a_softmax_that_is_rounded(generator):
    def build(emit, *inputs):
        return mixture(emit, *inputs, normalise=False, wide="bfloat16", scores_dtype="bfloat16")

    _, matches = apply(route_experts, module(build, "bfloat16", **SHAPES), generator)
    assert matches == 0


def test_scores_of_another_choice(generator):
    """Experts from one router, scores from another."""

    def build(emit, x, logits, gate_up, down):
        tops = []
        for scale in (1.0, -1.0):
            scaled = emit(relax.op.multiply(logits, relax.const(scale, "float32")))
            soft = emit(relax.op.nn.softmax(scaled, axis=-1))
            tops.append(emit(relax.op.topk(soft, TOP_K, axis=-1, largest=True, ret_type="both", dtype="int64")))
        experts, scores = emit(relax.TupleGetItem(tops[0], 1)), emit(relax.TupleGetItem(tops[1], 0))
        return emit(MOE({"x": x, "experts": experts, "scores": scores, "gate_up": gate_up, "down": down}))

    _, matches = apply(route_experts, module(build, **SHAPES), generator)
    assert matches == 0
