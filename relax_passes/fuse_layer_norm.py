"""LayerNorm written out in tensor operators becomes one operator."""

from __future__ import annotations

import tvm
from tvm import relax

from vllm_compile.ops import LAYER_NORM

from .base import Definitions, Rewrite, counted_pass, replace_by, rewrite_functions, same_type
from .fuse_rms_norm import match_scaled, wide


@counted_pass("fuse_layer_norm")
def fuse_layer_norm(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Recognise the LayerNorm of Cohere, which has no bias: the RMSNorm of x without its mean.

    Before:
        f = astype(x, float32)
        c = subtract(f, mean(f, axis=-1))
        y = astype(multiply(weight, multiply(c, rsqrt(add(mean(power(c, 2), axis=-1), eps)))), dtype)
    After:
        y = layer_norm(x, weight, eps=eps)
    """
    return rewrite_functions(module, _find)


def _find(function: relax.Function) -> dict[relax.Var, Rewrite]:
    d = Definitions(function)
    found: dict[relax.Var, Rewrite] = {}
    for binding in d.bindings:
        match = match_scaled(d, binding.value)
        centred = None if match is None else d.call(match.x, "relax.subtract")
        if match is None or centred is None:
            continue
        whole, mean = centred.args[0], d.call(centred.args[1], "relax.mean")
        is_mean = mean is not None and mean.args[0].same_as(whole) and [int(a) for a in mean.attrs.axis] == [-1]
        x = wide(d, whole)
        if is_mean and same_type(x, binding.var):
            norm = LAYER_NORM({"x": x, "weight": match.weight}, eps=match.eps)
            found[binding.var] = replace_by(binding.var, norm)
    return found
