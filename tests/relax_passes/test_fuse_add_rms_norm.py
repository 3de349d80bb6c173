"""A residual add whose sum is normalised next becomes one operator that gives both."""

from tvm import relax

from tests.relax_passes.harness import Shape, apply, module, operators
from vllm_compile.ops import RMS_NORM
from vllm_compile.relax_passes.fuse_add_rms_norm import fuse_add_rms_norm

X: Shape = (1, "T", 8)


def norm(emit, x, weight):
    return emit(RMS_NORM({"x": x, "weight": weight}, eps=1e-5))


def test_sum_and_norm(generator):
    def build(emit, residual, x, weight):
        total = emit(relax.op.add(residual, x))
        return relax.Tuple([total, norm(emit, total, weight)])

    after, matches = apply(fuse_add_rms_norm, module(build, residual=X, x=X, weight=(8,)), generator)
    assert matches == 1
    assert operators(after) == {"add_rms_norm": 1}


def test_sum_is_normalised_twice(generator):
    def build(emit, residual, x, first, second):
        total = emit(relax.op.add(residual, x))
        return relax.Tuple([norm(emit, total, first), norm(emit, total, second)])

    before = module(build, residual=X, x=X, first=(8,), second=(8,))
    after, matches = apply(fuse_add_rms_norm, before, generator)
    assert matches == 1
    assert operators(after) == {"add_rms_norm": 1, "rms_norm": 1}


def test_scale_is_computed_after_the_sum(generator):
    """The norm cannot move up to the sum, where its scale is not known yet."""

    def build(emit, residual, x, weight):
        total = emit(relax.op.add(residual, x))
        return norm(emit, total, emit(relax.op.add(weight, relax.const(1.0))))

    _, matches = apply(fuse_add_rms_norm, module(build, residual=X, x=X, weight=(8,)), generator)
    assert matches == 0


def test_bias_is_no_residual(generator):
    def build(emit, bias, x, weight):
        return norm(emit, emit(relax.op.add(x, bias)), weight)

    after, matches = apply(fuse_add_rms_norm, module(build, bias=(8,), x=X, weight=(8,)), generator)
    assert matches == 0
    assert operators(after) == {"relax.add": 1, "rms_norm": 1}


def test_norm_of_another_value(generator):
    def build(emit, residual, x, weight):
        return relax.Tuple([emit(relax.op.add(residual, x)), norm(emit, x, weight)])

    _, matches = apply(fuse_add_rms_norm, module(build, residual=X, x=X, weight=(8,)), generator)
    assert matches == 0
