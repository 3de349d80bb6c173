"""A LayerNorm without bias, written out, becomes one operator."""

import pytest
from tvm import relax

from tests.relax_passes.harness import Shape, apply, module, own_operators
from vllm_compile.relax_passes.fuse_layer_norm import fuse_layer_norm

X: Shape = (1, "T", 16)


def norm(emit, x, weight, axis=-1, other=None):
    """Cohere's; near misses average over another axis, or take the mean of something else."""
    wide = emit(relax.op.astype(x, "float32")) if str(x.ty.dtype) != "float32" else x
    of = wide if other is None else other
    mean = emit(relax.op.mean(of, axis=[axis], keepdims=True))
    centred = emit(relax.op.subtract(wide, mean))
    square = emit(relax.op.mean(emit(relax.op.power(centred, relax.const(2.0))), axis=[-1], keepdims=True))
    root = emit(relax.op.rsqrt(emit(relax.op.add(square, relax.const(1e-5)))))
    scale = emit(relax.op.astype(weight, "float32")) if str(weight.ty.dtype) != "float32" else weight
    y = emit(relax.op.multiply(scale, emit(relax.op.multiply(centred, root))))
    return emit(relax.op.astype(y, x.ty.dtype)) if y.ty.dtype != x.ty.dtype else y


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_operator(dtype, generator):
    after, matches = apply(fuse_layer_norm, module(norm, dtype, x=X, weight=(16,)), generator)
    assert matches == 1
    assert own_operators(after) == {"layer_norm": 1}


def test_mean_over_the_tokens(generator):
    before = module(lambda emit, x, w: norm(emit, x, w, axis=1), x=X, weight=(16,))
    _, matches = apply(fuse_layer_norm, before, generator)
    assert matches == 0


def test_mean_of_something_else(generator):
    before = module(lambda emit, x, w, y: norm(emit, x, w, other=y), x=X, weight=(16,), y=X)
    _, matches = apply(fuse_layer_norm, before, generator)
    assert matches == 0
