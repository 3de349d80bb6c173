"""Elementary functions on whole vectors: LLVM's own, such as llvm.exp, call the C library lane by lane."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

LOG2_E = 1.4426950408889634
# ln 2 in two parts (Cody & Waite 1980): the first has 9 significant bits, so that n * LN2_HIGH is exact.
LN2_HIGH = 0.693359375
LN2_LOW = -2.1219444005469057e-4
# exp on [-ln2/2, ln2/2]: the Chebyshev interpolant of degree 6, in powers of x, rounded to float32; relative
# error 2.1e-8.  tests/schedules/test_vector_math.py derives them again.
EXP_COEFFICIENTS = (
    1.0,
    1.0,
    0.5,
    0.16666415333747864,
    0.04166635125875473,
    0.008375134319067001,
    0.0013941118959337473,
)
EXP_MAX = 88.72283  # the largest float32 whose exp is finite
EXP_MIN = -87.33654  # exp of it is the smallest normal float32


def exp(x: tirx.Expr) -> tirx.Expr:
    """exp of a float32 scalar or vector, with a relative error below 2e-7.

    x = n * ln 2 + r with an integer n and |r| <= ln2 / 2; exp(r) by a polynomial; n added to its exponent.
    Below EXP_MIN, also for -inf, the result is 0; above EXP_MAX, also for inf, that of EXP_MAX; for NaN, NaN.
    Pass whole vectors, or bind the result: inside T.vectorized it must not occur twice in an expression.
    """
    lanes = x.ty.dtype.lanes
    float_type, int_type = (f"{base}x{lanes}" if lanes > 1 else base for base in ("float32", "int32"))

    def splat(value: tirx.Expr) -> tirx.Expr:
        return T.broadcast(value, lanes) if lanes > 1 else value

    def constant(value: float) -> tirx.Expr:
        return splat(T.float32(value))

    def fma(a: tirx.Expr, b: tirx.Expr, c: tirx.Expr) -> tirx.Expr:
        return T.call_llvm_pure_intrin(float_type, "llvm.fma", a, b, c)

    capped, n, r = (tirx.Var(name, float_type) for name in ("capped", "n", "r"))
    polynomial = constant(EXP_COEFFICIENTS[-1])
    for coefficient in reversed(EXP_COEFFICIENTS[:-1]):
        polynomial = fma(polynomial, r, constant(coefficient))
    exponent = T.shift_left(T.Cast(int_type, n), splat(T.int32(23)))
    result = T.reinterpret(float_type, T.reinterpret(int_type, polynomial) + exponent)
    result = T.Select(capped < constant(EXP_MIN), constant(0.0), result)
    reduced = fma(n, constant(-LN2_LOW), fma(n, constant(-LN2_HIGH), capped))
    nearest = T.call_llvm_pure_intrin(float_type, "llvm.nearbyint", capped * constant(LOG2_E))
    # T.Select, unlike T.min, is certain to keep a NaN.
    at_most = T.Select(x > constant(EXP_MAX), constant(EXP_MAX), x)
    for variable, value in ((r, reduced), (n, nearest), (capped, at_most)):
        result = tirx.Let(variable, value, result)
    return result
