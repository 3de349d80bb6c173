"""RMSNorm written out in tensor operators becomes one operator."""

import pytest
from tvm import relax

from tests.relax_passes.harness import Shape, apply, module, operators
from vllm_compile.ops import RMS_NORM
from vllm_compile.relax_passes.base import Definitions
from vllm_compile.relax_passes.fuse_rms_norm import fuse_rms_norm

EPS = 1e-5
SHAPES: dict[str, Shape] = {"x": (1, "T", 8), "weight": (8,)}


def norm(dtype, *, axis=-1, exponent=2.0, wide=True, narrow_first=True, weight_first=True):
    """Builds LlamaRMSNorm, or with options something that looks like it."""

    def build(emit, x, weight, *_):
        f = emit(relax.op.astype(x, "float32")) if wide and dtype != "float32" else x
        kind = "float32" if wide else dtype
        squares = emit(relax.op.power(f, relax.const(exponent, kind)))
        mean = emit(relax.op.mean(squares, axis=[axis], keepdims=True))
        root = emit(relax.op.rsqrt(emit(relax.op.add(mean, relax.const(EPS, kind)))))
        y = emit(relax.op.multiply(f, root))
        if wide and dtype != "float32" and narrow_first:
            y = emit(relax.op.astype(y, dtype))
        elif not narrow_first:
            weight = emit(relax.op.astype(weight, "float32"))
        return emit(relax.op.multiply(weight, y) if weight_first else relax.op.multiply(y, weight))

    return build


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight_first", [True, False])
def test_becomes_one_operator(dtype, weight_first, generator):
    before = module(norm(dtype, weight_first=weight_first), dtype, **SHAPES)
    after, matches = apply(fuse_rms_norm, before, generator)
    assert matches == 1
    assert operators(after) == {"rms_norm": 1}
    (binding,) = (b for b in Definitions(after).bindings if isinstance(b.value, relax.Call))
    assert binding.value.attrs["eps"] == pytest.approx(EPS)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {"axis": 1}),
        ("float32", {"exponent": 4.0}),
        ("bfloat16", {"wide": False}),
        ("bfloat16", {"narrow_first": False}),
    ],
    ids=["another axis", "another power", "computed in bfloat16", "scaled in float32"],
)
def test_near_misses(dtype, options, generator):
    before = module(norm(dtype, **options), dtype, **SHAPES)
    after, matches = apply(fuse_rms_norm, before, generator)
    assert matches == 0
    assert "rms_norm" not in operators(after)


@pytest.mark.parametrize("rotated", [True, False], ids=["behind a rotation", "behind a permutation"])
def test_rows_of_heads_are_permuted_to_lie_by_token(rotated, generator):
    def build(emit, x, weight):
        x = emit(relax.op.permute_dims(x, [0, 2, 1, 3]))
        return norm("float32")(emit, emit(relax.op.tanh(x)) if rotated else x, weight)

    after, matches = apply(fuse_rms_norm, module(build, x=(1, "T", 3, 8), weight=(8,)), generator)
    assert matches == 1
    (call,) = (b.value for b in Definitions(after).bindings if RMS_NORM.matches(b.value))
    assert [int(dim) for dim in call.ty.shape.values[2:]] == [3, 8]
    assert operators(after)["relax.permute_dims"] == (3 if rotated else 1)


def test_root_of_another_value(generator):
    def build(emit, x, weight, other):
        mean = emit(relax.op.mean(emit(relax.op.power(other, relax.const(2.0))), axis=[-1], keepdims=True))
        root = emit(relax.op.rsqrt(emit(relax.op.add(mean, relax.const(EPS)))))
        return emit(relax.op.multiply(weight, emit(relax.op.multiply(x, root))))

    _, matches = apply(fuse_rms_norm, module(build, **SHAPES, other=(1, "T", 8)), generator)
    assert matches == 0


def test_scale_of_every_element(generator):
    before = module(norm("float32"), x=(1, "T", 8), weight=("T", 8))
    _, matches = apply(fuse_rms_norm, before, generator)
    assert matches == 0
