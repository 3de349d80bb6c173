"""RMSNorm written out in tensor operators becomes one operator."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from vllm_compile.ops import RMS_NORM

from .base import Definitions, Rewrite, counted_pass, replace_by, rewrite_functions, same_type


@counted_pass("fuse_rms_norm")
def fuse_rms_norm(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Recognise the RMSNorm of Llama and its relatives.

    Before:
        f = astype(x, float32)
        y = multiply(weight, astype(multiply(f, rsqrt(add(mean(power(f, 2), axis=-1), eps))), dtype))
    After:
        y = rms_norm(x, weight, eps=eps)
    """
    return rewrite_functions(module, _find)


def _find(function: relax.Function) -> dict[relax.Var, Rewrite]:
    definitions = Definitions(function)
    found: dict[relax.Var, Rewrite] = {}
    for binding in definitions.bindings:
        if (match := _match(definitions, binding.value)) is not None:
            x, weight, eps = match
            norm = RMS_NORM({"x": x, "weight": weight}, eps=eps)
            found[binding.var] = replace_by(binding.var, norm)
    return found


def _match(d: Definitions, expr: Any) -> tuple[relax.Expr, relax.Expr, float] | None:
    """(x, weight, eps) if `expr` is a whole RMSNorm."""
    scaled = d.call(expr, "relax.multiply")
    if scaled is None:
        return None
    for weight, normed in (tuple(scaled.args), tuple(scaled.args)[::-1]):
        is_scale = isinstance(weight.ty, relax.TensorType) and len(weight.ty.shape.values) == 1
        match = _match_normed(d, _wide(d, normed)) if is_scale else None
        if match is not None and same_type(match[0], scaled):
            return match[0], weight, match[1]
    return None


def _match_normed(d: Definitions, expr: Any) -> tuple[relax.Expr, float] | None:
    """(x, eps) if `expr` is x * rsqrt(mean(x ** 2) + eps), computed in float32."""
    product = d.call(expr, "relax.multiply")
    if product is None:
        return None
    x, root = product.args
    shifted = d.call(d.operand(root, "relax.rsqrt"), "relax.add")
    mean = d.call(d.operand(shifted, "relax.add"), "relax.mean")
    power = d.call(d.operand(mean, "relax.mean"), "relax.power")
    if power is None or d.constant(power.args[1]) != 2.0 or [int(a) for a in mean.attrs.axis] != [-1]:
        return None
    if str(x.ty.dtype) != "float32":
        return None
    eps = d.constant(shifted.args[1])
    same = d.value(power.args[0]) is d.value(x) or power.args[0].same_as(x)
    return (_wide(d, x), eps) if same and eps is not None else None


def _wide(d: Definitions, expr: Any) -> Any:
    """What a cast is applied to; anything else stands for itself."""
    cast = d.call(expr, "relax.astype")
    return cast.args[0] if cast is not None else expr
