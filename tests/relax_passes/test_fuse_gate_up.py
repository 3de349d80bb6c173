"""The two projections of a gated MLP and its SiLU become one operator on one merged weight."""

import pytest
from tvm import relax

from tests.relax_passes.harness import Shape, apply, module, operators
from vllm_compile.ops import LINEAR
from vllm_compile.relax_passes.fuse_gate_up import fuse_gate_up

X: Shape = (1, "T", 8)
SHAPES: dict[str, Shape] = {"x": X, "gate": (12, 8), "up": (12, 8)}


def linear(emit, x, weight, bias=None):
    return emit(LINEAR({"x": x, "weight": weight, "bias": bias}))


def gated(emit, gate, up):
    return emit(relax.op.multiply(emit(relax.op.nn.silu(gate)), up))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_operator(dtype, generator):
    def build(emit, x, gate, up):
        return gated(emit, linear(emit, x, gate), linear(emit, x, up))

    after, matches = apply(fuse_gate_up, module(build, dtype, **SHAPES), generator)
    assert matches == 1
    assert operators(after) == {"gate_up_silu": 1, "relax.concat": 1}


def test_different_activations(generator):
    def build(emit, x, gate, up, other):
        return gated(emit, linear(emit, x, gate), linear(emit, other, up))

    after, matches = apply(fuse_gate_up, module(build, **SHAPES, other=X), generator)
    assert matches == 0
    assert operators(after)["linear"] == 2


def test_with_bias(generator):
    def build(emit, x, gate, up, bias):
        return gated(emit, linear(emit, x, gate, bias), linear(emit, x, up))

    _, matches = apply(fuse_gate_up, module(build, **SHAPES, bias=(12,)), generator)
    assert matches == 0


def test_one_column_for_all(generator):
    def build(emit, x, gate, up):
        return gated(emit, linear(emit, x, gate), linear(emit, x, up))

    _, matches = apply(fuse_gate_up, module(build, **SHAPES | {"up": (1, 8)}), generator)
    assert matches == 0


def test_without_activation(generator):
    def build(emit, x, gate, up):
        return emit(relax.op.multiply(linear(emit, x, gate), linear(emit, x, up)))

    _, matches = apply(fuse_gate_up, module(build, **SHAPES), generator)
    assert matches == 0
