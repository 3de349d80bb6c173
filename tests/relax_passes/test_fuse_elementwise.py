"""What is left between operators of ours becomes one operator each."""

import pytest
from tvm import relax

from tests.relax_passes.harness import Shape, apply, module, operators
from vllm_compile.errors import UnsupportedError
from vllm_compile.ops import LINEAR
from vllm_compile.relax_passes.fuse_elementwise import fuse_elementwise

X: Shape = (1, "T", 16)
W: Shape = (16, 16)


def linear(emit, x, w):
    return emit(LINEAR({"x": x, "weight": w}))


def half(x):
    return relax.const(0.5, x.ty.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_chain_is_one_operator(dtype, generator):
    def build(emit, x, w, v):
        y = linear(emit, x, w)
        z = emit(relax.op.multiply(emit(relax.op.tanh(emit(relax.op.nn.gelu(y)))), half(y)))
        return linear(emit, emit(relax.op.add(z, x)), v)

    after, matches = apply(fuse_elementwise, module(build, dtype, x=X, w=W, v=W), generator)
    assert matches == 1
    assert operators(after) == {"linear": 2, "elementwise": 1}


def test_changes_of_an_index(generator):
    """A rotation of heads: reshapes, permutations, slices, concatenations."""

    def build(emit, x, w, v):
        heads = emit(relax.op.reshape(linear(emit, x, w), (1, x.ty.shape.values[1], 2, 8)))
        swapped = emit(relax.op.permute_dims(heads, [0, 2, 1, 3]))
        first, second = (emit(relax.op.strided_slice(swapped, [3], [begin], [begin + 4], [1])) for begin in (0, 4))
        turned = emit(relax.op.concat([emit(relax.op.negative(second)), first], axis=3))
        back = emit(relax.op.permute_dims(turned, [0, 2, 1, 3]))
        return linear(emit, emit(relax.op.reshape(back, (1, x.ty.shape.values[1], 16))), v)

    after, matches = apply(fuse_elementwise, module(build, x=X, w=W, v=W), generator)
    assert matches == 1
    assert operators(after) == {"linear": 2, "elementwise": 1}


def test_repeated_heads(generator):
    """Falcon's keys: each head repeated, then every second taken again costs nothing."""

    def build(emit, x, w, v):
        tokens = x.ty.shape.values[1]
        heads = emit(relax.op.reshape(linear(emit, x, w), (1, tokens, 2, 1, 8)))
        repeated = emit(relax.op.broadcast_to(heads, (1, tokens, 2, 2, 8)))
        scaled = emit(relax.op.multiply(emit(relax.op.reshape(repeated, (1, tokens, 32))), half(x)))
        return linear(emit, scaled, v)

    after, matches = apply(fuse_elementwise, module(build, x=X, w=W, v=(16, 32)), generator)
    assert matches == 1
    assert operators(after) == {"linear": 2, "elementwise": 1}


def test_a_value_that_ours_reads_is_computed_once(generator):
    def build(emit, x, w, v):
        stream = emit(relax.op.add(x, linear(emit, x, w)))
        return emit(relax.op.add(stream, emit(relax.op.multiply(linear(emit, stream, v), half(x)))))

    after, matches = apply(fuse_elementwise, module(build, x=X, w=W, v=W), generator)
    assert matches == 2
    assert operators(after) == {"linear": 2, "elementwise": 2}


def test_whole_numbers_are_numbers(generator):
    """MiniCPM 3 has one, a cast int64."""

    def build(emit, x):
        return emit(relax.op.multiply(x, emit(relax.op.astype(relax.const(3, "int64"), "float32"))))

    after, matches = apply(fuse_elementwise, module(build, x=X), generator)
    assert matches == 1
    assert operators(after) == {"elementwise": 1}


def test_views_cost_nothing(generator):
    def build(emit, x, w):
        y = linear(emit, x, w)
        return emit(relax.op.reshape(y, (1, x.ty.shape.values[1], 2, 8)))

    after, matches = apply(fuse_elementwise, module(build, x=X, w=W), generator)
    assert matches == 0
    assert operators(after) == {"linear": 1, "relax.reshape": 1}


@pytest.mark.parametrize("build", [relax.op.sin, lambda x: relax.op.permute_dims(x, [0, 2, 1])], ids=["sin", "swap"])
def test_what_has_no_kernel_is_named(build):
    def whole(emit, x):
        return emit(build(x))

    with pytest.raises(UnsupportedError, match=r"operator relax\.(sin|permute_dims) .* has no kernel"):
        fuse_elementwise(module(whole, x=X))
