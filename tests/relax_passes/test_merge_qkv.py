"""Linear layers that read the same activations become one on a merged weight."""

import pytest
from tvm import relax

from tests.relax_passes.harness import Shape, apply, module, operators, own_operators
from vllm_compile.ops import LINEAR
from vllm_compile.relax_passes.merge_qkv import merge_qkv

X: Shape = (1, "T", 8)
WEIGHTS: dict[str, Shape] = {"wq": (12, 8), "wk": (4, 8), "wv": (6, 8)}
BIASES: dict[str, Shape] = {"bq": (12,), "bk": (4,), "bv": (6,)}


def linear(emit, x, weight, bias=None, residual=None):
    return emit(LINEAR({"x": x, "weight": weight, "bias": bias, "residual": residual}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_projections(dtype, generator):
    def build(emit, x, *weights):
        return relax.Tuple([linear(emit, x, weight) for weight in weights])

    after, matches = apply(merge_qkv, module(build, dtype, x=X, **WEIGHTS), generator)
    assert matches == 1
    assert operators(after) == {"linear": 1, "relax.concat": 1, "relax.split": 1}


def test_with_biases(generator):
    def build(emit, x, *tensors):
        return relax.Tuple([linear(emit, x, w, b) for w, b in zip(tensors[:3], tensors[3:], strict=True)])

    after, matches = apply(merge_qkv, module(build, x=X, **WEIGHTS, **BIASES), generator)
    assert matches == 1
    assert operators(after) == {"linear": 1, "relax.concat": 2, "relax.split": 1}


def test_some_with_bias(generator):
    """Those without one are merged, the other stays."""

    def build(emit, x, wq, wk, wv, bias):
        return relax.Tuple([linear(emit, x, wq), linear(emit, x, wk, bias), linear(emit, x, wv)])

    after, matches = apply(merge_qkv, module(build, x=X, **WEIGHTS, bk=(4,)), generator)
    assert matches == 1
    assert own_operators(after) == {"linear": 2}


def test_weight_is_computed_late(generator):
    """It is not known where the first of the layers stands; the other two are merged."""

    def build(emit, x, wq, wk, wv):
        parts = [linear(emit, x, wq), linear(emit, x, emit(relax.op.negative(wk))), linear(emit, x, wv)]
        return relax.Tuple(parts)

    after, matches = apply(merge_qkv, module(build, x=X, **WEIGHTS), generator)
    assert matches == 1
    assert own_operators(after) == {"linear": 2}


def test_different_activations(generator):
    def build(emit, x, other, wq, wk, wv):
        return relax.Tuple([linear(emit, x, wq), linear(emit, other, wk)])

    after, matches = apply(merge_qkv, module(build, x=X, other=X, **WEIGHTS), generator)
    assert matches == 0
    assert own_operators(after) == {"linear": 2}


def test_with_residual(generator):
    def build(emit, x, residual, wq, wk, wv):
        return relax.Tuple([linear(emit, x, wq, residual=residual), linear(emit, x, wk)])

    _, matches = apply(merge_qkv, module(build, x=X, residual=(1, "T", 12), **WEIGHTS), generator)
    assert matches == 0
