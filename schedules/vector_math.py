"""Elementary functions on whole vectors: LLVM's own, such as llvm.exp, call the C library lane by lane."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm import tirx
from tvm.script import tirx as T

# Gives a value a name that may be used several times.
Bind = Callable[[tirx.Expr], tirx.Expr]

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
    Pass whole vectors; for the values of a loop use FUNCTIONS.
    """
    bindings: list[tuple[tirx.Var, tirx.Expr]] = []

    def bind(value: tirx.Expr) -> tirx.Expr:
        variable = tirx.Var(f"exp_{len(bindings)}", value.ty)
        bindings.append((variable, value))
        return variable

    result = _exp(x, bind)
    for variable, value in reversed(bindings):
        result = tirx.Let(variable, value, result)
    return result


def _exp(x: tirx.Expr, bind: Bind) -> tirx.Expr:
    lanes = x.ty.dtype.lanes
    float_type, int_type = (f"{base}x{lanes}" if lanes > 1 else base for base in ("float32", "int32"))

    def splat(value: tirx.Expr) -> tirx.Expr:
        return T.broadcast(value, lanes) if lanes > 1 else value

    def fma(a: tirx.Expr, b: tirx.Expr, c: tirx.Expr) -> tirx.Expr:
        return T.call_llvm_pure_intrin(float_type, "llvm.fma", a, b, c)

    # T.Select, unlike T.min, is certain to keep a NaN.
    capped = bind(T.Select(x > constant(EXP_MAX, x), constant(EXP_MAX, x), x))
    n = bind(T.call_llvm_pure_intrin(float_type, "llvm.nearbyint", capped * constant(LOG2_E, x)))
    r = bind(fma(n, constant(-LN2_LOW, x), fma(n, constant(-LN2_HIGH, x), capped)))
    polynomial = constant(EXP_COEFFICIENTS[-1], x)
    for coefficient in reversed(EXP_COEFFICIENTS[:-1]):
        polynomial = fma(polynomial, r, constant(coefficient, x))
    exponent = T.shift_left(T.Cast(int_type, n), splat(T.int32(23)))
    result = T.reinterpret(float_type, T.reinterpret(int_type, polynomial) + exponent)
    return T.Select(capped < constant(EXP_MIN, x), constant(0.0, x), result)


def constant(value: float, like: tirx.Expr) -> tirx.Expr:
    """A float32 number in as many lanes as `like` has."""
    lanes = like.ty.dtype.lanes
    return T.broadcast(T.float32(value), lanes) if lanes > 1 else T.float32(value)


# Those below take `bind`, which gives a value a name: in memory, for TVM puts a pure value that `T.Bind` names into
# each of its uses, and expressions explode.  Their operands are float32 scalars or vectors that have names.
def sigmoid(bind: Bind, x: tirx.Expr) -> tirx.Expr:
    """1 / (1 + exp(-x))"""
    return T.float32(1) / (T.float32(1) + bind(_exp(T.float32(0) - x, bind)))


def tanh(bind: Bind, x: tirx.Expr) -> tirx.Expr:
    """tanh, with an absolute error below 2e-7."""
    return T.float32(1) - T.float32(2) / (bind(_exp(x + x, bind)) + T.float32(1))


# erf on [0, inf) as 1 - (a1 t + ... + a5 t^5) exp(-x^2), t = 1 / (1 + p x): Abramowitz & Stegun 1964, 7.1.26,
# absolute error 1.5e-7.
ERF_P = 0.3275911
ERF_COEFFICIENTS = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def erf(bind: Bind, x: tirx.Expr) -> tirx.Expr:
    """erf, with an absolute error below 4e-7."""
    size = bind(T.Select(x < constant(0, x), T.float32(0) - x, x))
    t = bind(T.float32(1) / (T.float32(1) + T.float32(ERF_P) * size))
    polynomial = T.float32(0)
    for coefficient in reversed(ERF_COEFFICIENTS):
        polynomial = (polynomial + T.float32(coefficient)) * t
    result = bind(T.float32(1) - polynomial * bind(_exp(T.float32(0) - size * size, bind)))
    return T.Select(x < constant(0, x), T.float32(0) - result, result)


def gelu(bind: Bind, x: tirx.Expr) -> tirx.Expr:
    """x times the normal distribution function of x (Hendrycks & Gimpel 2016)."""
    return x * T.float32(0.5) * (T.float32(1) + erf(bind, bind(x * T.float32(2**-0.5))))


def gelu_tanh(bind: Bind, x: tirx.Expr) -> tirx.Expr:
    """The same authors' approximation by tanh."""
    inner = bind(T.float32(0.7978845608028654) * (x + T.float32(0.044715) * x * x * x))
    return x * T.float32(0.5) * (T.float32(1) + tanh(bind, inner))


# By the names of `vllm_compile.expression`.
FUNCTIONS: Mapping[str, Callable[..., tirx.Expr]] = {
    "abs": lambda bind, x: T.Select(x < constant(0, x), T.float32(0) - x, x),
    "exp": lambda bind, x: _exp(x, bind),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "negative": lambda bind, x: T.float32(0) - x,
    "relu": lambda bind, x: T.Select(x < constant(0, x), constant(0, x), x),
    "rsqrt": lambda bind, x: T.float32(1) / T.sqrt(x),
    "sigmoid": sigmoid,
    "silu": lambda bind, x: x * sigmoid(bind, x),
    "sqrt": lambda bind, x: T.sqrt(x),
    "square": lambda bind, x: x * x,
    "tanh": tanh,
    "add": lambda bind, a, b: a + b,
    "divide": lambda bind, a, b: a / b,
    "maximum": lambda bind, a, b: T.Select(a < b, b, a),
    "minimum": lambda bind, a, b: T.Select(b < a, b, a),
    "multiply": lambda bind, a, b: a * b,
    "subtract": lambda bind, a, b: a - b,
}
