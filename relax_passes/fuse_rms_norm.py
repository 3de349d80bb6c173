"""RMSNorm written out in tensor operators becomes one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from vllm_compile.ops import RMS_NORM

from .base import Definitions, Rewrite, counted_pass, replace_by, rewrite_functions, same_type


@counted_pass("fuse_rms_norm")
def fuse_rms_norm(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Recognise the RMSNorm of Llama and its relatives.

    Before:
        f = astype(x, float32)
        y = multiply(weight, astype(multiply(f, rsqrt(add(mean(power(f, 2), axis=-1), eps))), dtype))
        or, with a float32 weight, y = astype(multiply(weight, multiply(f, rsqrt(...))), dtype)
    After:
        y = rms_norm(x, weight, eps=eps)
    """
    return rewrite_functions(module, _find)


def _find(function: relax.Function) -> dict[relax.Var, Rewrite]:
    definitions = Definitions(function)
    found: dict[relax.Var, Rewrite] = {}
    for binding in definitions.bindings:
        match = match_scaled(definitions, binding.value)
        if match is not None and same_type(match.x, binding.var):
            found[binding.var] = _fuse(definitions, binding.var, match)
    return found


def _fuse(d: Definitions, var: relax.Var, match: Scaled) -> Rewrite:
    """The norm, of rows that lie one after the other, a token's together; where they do not, permuted for it.

    If they come from a permutation, the norm comes before it.
    """
    permuted = d.call(match.x, "relax.permute_dims")
    axes = [] if permuted is None else [int(axis) for axis in permuted.attrs.axes]
    if axes and axes[-1] == len(axes) - 1:
        x = permuted.args[0]
    elif (order := _token_major(match.x)) is not None:
        x, axes = relax.op.permute_dims(match.x, order), [order.index(axis) for axis in range(len(order))]
    else:
        return replace_by(var, RMS_NORM({"x": match.x, "weight": match.weight}, eps=match.eps))

    def rewrite(emit):
        norm = emit(RMS_NORM({"x": emit(x), "weight": match.weight}, eps=match.eps))
        return {var: relax.op.permute_dims(norm, axes)}

    return rewrite


def _token_major(x: relax.Expr) -> list[int] | None:
    """The order of axes that brings the tokens to the front, but for the last; None if nothing is before them."""
    shape = x.ty.shape.values
    tokens = next((axis for axis, dim in enumerate(shape) if isinstance(dim, tirx.Var)), 0)
    before = [axis for axis in range(tokens) if int(shape[axis]) != 1]
    rest = [axis for axis in range(len(shape)) if axis not in (*before, tokens)]
    return [*rest[: tokens - len(before)], tokens, *before, *rest[tokens - len(before) :]] if before else None


@dataclass(frozen=True)
class Scaled:
    """A vector over its root mean square, times a weight; `x` is the vector before any cast to float32."""

    x: relax.Expr
    weight: relax.Expr
    eps: float


def match_scaled(d: Definitions, expr: Any) -> Scaled | None:
    """What `expr` scales, if it is a whole RMSNorm, scaled before or after the rounding to the model's dtype."""
    cast = d.call(expr, "relax.astype")
    scaled = d.call(expr if cast is None else cast.args[0], "relax.multiply")
    if scaled is None or (cast is not None and str(scaled.ty.dtype) != "float32"):
        return None
    for weight, normed in (tuple(scaled.args), tuple(scaled.args)[::-1]):
        is_scale = isinstance(weight.ty, relax.TensorType) and len(weight.ty.shape.values) == 1
        match = _match_normed(d, normed if cast is not None else wide(d, normed)) if is_scale else None
        if match is not None:
            return Scaled(match[0], weight, match[1])
    return None


def _match_normed(d: Definitions, expr: Any) -> tuple[relax.Expr, float] | None:
    """(x, eps) if `expr` is x * rsqrt(mean(x ** 2) + eps), computed in float32."""
    product = d.call(expr, "relax.multiply")
    factors = () if product is None else tuple(product.args)
    return next(filter(None, (_match_factors(d, *pair) for pair in (factors, factors[::-1]) if pair)), None)


def _match_factors(d: Definitions, x: relax.Expr, root: relax.Expr) -> tuple[relax.Expr, float] | None:
    """(x, eps) if `root` is rsqrt(mean(x ** 2) + eps), computed in float32."""
    shifted = d.call(d.operand(root, "relax.rsqrt"), "relax.add")
    mean = d.call(d.operand(shifted, "relax.add"), "relax.mean")
    power = d.call(d.operand(mean, "relax.mean"), "relax.power")
    if power is None or d.constant(power.args[1]) != 2.0 or [int(a) for a in mean.attrs.axis] != [-1]:
        return None
    if str(x.ty.dtype) != "float32":
        return None
    eps = d.constant(shifted.args[1])
    same = d.value(power.args[0]) is d.value(x) or power.args[0].same_as(x)
    return (wide(d, x), eps) if same and eps is not None else None


def wide(d: Definitions, expr: Any) -> Any:
    """What a cast is applied to; anything else stands for itself."""
    cast = d.call(expr, "relax.astype")
    return cast.args[0] if cast is not None else expr
