"""Vector functions against float64, over their whole range and at its ends."""

import numpy as np
import pytest
import torch
import tvm_ffi
from numpy.polynomial import Chebyshev, Polynomial
from tvm.script import tirx as T

from vllm_compile.schedules import vector_math
from vllm_compile.schedules.build import build_library

from .levels import TARGETS


def elementwise(function, lanes: int):
    def place(i):
        return T.ramp(i * lanes, 1, lanes) if lanes > 1 else i

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, y: T.handle):
        count = T.int64()
        x_N = T.match_buffer(x, (count,), "float32", align=4)
        y_N = T.match_buffer(y, (count,), "float32", align=4)
        for i in T.parallel(count // lanes):
            y_N[place(i)] = function(x_N[place(i)])

    return kernel


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    return request.param


@pytest.fixture(scope="module", params=(1, 8, 16))
def exp(request, target, tmp_path_factory):
    lanes = request.param
    path = tmp_path_factory.mktemp("exp") / "exp.so"
    build_library({"exp": elementwise(vector_math.exp, lanes)}, target, path)
    module = tvm_ffi.load_module(str(path))

    def call(x: torch.Tensor) -> torch.Tensor:
        y = torch.full_like(x, float("nan"))
        module["exp"](x, y)
        return y

    return call


def relative_error(ours: torch.Tensor, x: torch.Tensor) -> float:
    return ((ours.double() - x.double().exp()) / x.double().exp()).abs().max().item()


def test_exp_is_accurate_to_rounding(exp, generator):
    x = torch.rand(1 << 20, generator=generator) * (88.7 + 87.3) - 87.3
    assert relative_error(exp(x), x) < 2e-7
    small = torch.randn(1 << 18, generator=generator) * 1e-3
    assert relative_error(exp(small), small) < 2e-7


def test_comparison_sees_a_wrong_exp(exp, generator):
    x = torch.rand(1 << 16, generator=generator)
    with pytest.raises(AssertionError):
        assert relative_error(exp(x * (1 + 1e-6)), x) < 2e-7


def test_exp_at_the_ends(exp):
    inf, nan, last = float("inf"), float("nan"), vector_math.EXP_MAX
    x = torch.tensor(
        [0.0, -0.0, -inf, -1e30, -104.0, -87.34, -87.3, last, last + 1, inf, nan, -1.0, 1.0, 2.0, 3.0, 88.0]
    )
    y = exp(x)
    assert y[:6].tolist() == [1, 1, 0, 0, 0, 0]
    assert y[7].isfinite()
    assert y[8] == y[9] == y[7]
    assert y[10].isnan()
    normal = torch.cat([x[6:8], x[11:]])
    assert relative_error(torch.cat([y[6:8], y[11:]]), normal) < 2e-7


def test_coefficients_are_the_chebyshev_interpolant():
    half = np.log(2) / 2
    degree = len(vector_math.EXP_COEFFICIENTS) - 1
    interpolant = Chebyshev.interpolate(np.exp, degree, domain=[-half, half])
    powers = interpolant.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef
    np.testing.assert_allclose(vector_math.EXP_COEFFICIENTS, powers.astype(float), rtol=2e-6)
    r = np.linspace(-half, half, 10001)
    ours = np.polynomial.polynomial.polyval(r, vector_math.EXP_COEFFICIENTS)
    assert np.abs(ours / np.exp(r) - 1).max() < 2.5e-8
