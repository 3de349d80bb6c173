"""A residual add right behind a linear layer becomes that layer's epilogue."""

import pytest
from tvm import relax

from tests.relax_passes.harness import Shape, apply, module, operators
from vllm_compile.ops import LINEAR
from vllm_compile.relax_passes.fuse_residual import fuse_residual

SHAPES: dict[str, Shape] = {"x": (1, "T", 8), "weight": (6, 8), "residual": (1, "T", 6)}


def linear(emit, x, weight, **more):
    return emit(LINEAR({"x": x, "weight": weight, **more}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("residual_first", [True, False])
def test_epilogue(dtype, residual_first, generator):
    def build(emit, x, weight, residual):
        y = linear(emit, x, weight)
        return emit(relax.op.add(residual, y) if residual_first else relax.op.add(y, residual))

    after, matches = apply(fuse_residual, module(build, dtype, **SHAPES), generator)
    assert matches == 1
    assert operators(after) == {"linear": 1}


def test_bias_stays(generator):
    def build(emit, x, weight, residual, bias):
        return emit(relax.op.add(residual, linear(emit, x, weight, bias=bias)))

    after, matches = apply(fuse_residual, module(build, **SHAPES, bias=(6,)), generator)
    assert matches == 1
    assert operators(after) == {"linear": 1}


def test_product_is_used_twice(generator):
    def build(emit, x, weight, residual):
        y = linear(emit, x, weight)
        return relax.Tuple([emit(relax.op.add(residual, y)), y])

    after, matches = apply(fuse_residual, module(build, **SHAPES), generator)
    assert matches == 0
    assert operators(after) == {"linear": 1, "relax.add": 1}


def test_row_for_all_tokens(generator):
    def build(emit, x, weight, residual):
        return emit(relax.op.add(residual, linear(emit, x, weight)))

    _, matches = apply(fuse_residual, module(build, **SHAPES | {"residual": (6,)}), generator)
    assert matches == 0


def test_second_residual(generator):
    """A linear layer has room for one: the other add stays."""

    def build(emit, x, weight, residual, other):
        return emit(relax.op.add(other, linear(emit, x, weight, residual=residual)))

    after, matches = apply(fuse_residual, module(build, **SHAPES, other=(1, "T", 6)), generator)
    assert matches == 0
    assert operators(after) == {"linear": 1, "relax.add": 1}
