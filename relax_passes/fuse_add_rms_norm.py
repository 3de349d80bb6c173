"""A residual add whose sum is normalised next: one operator that gives both."""

from __future__ import annotations

import tvm
from tvm import relax

from vllm_compile.ops import ADD_RMS_NORM, RMS_NORM
from vllm_compile.ops.base import arguments_of

from .base import Definitions, Rewrite, counted_pass, rewrite_functions, same_type


@counted_pass("fuse_add_rms_norm")
def fuse_add_rms_norm(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Compute sum and norm in one pass over memory.

    Before:
        s = add(residual, x)
        y = rms_norm(s, weight, eps=eps)
    After:
        p = add_rms_norm(x, residual, weight, eps=eps)
        s, y = p[0], p[1]
    """
    return rewrite_functions(module, _find)


def _find(function: relax.Function) -> dict[relax.Var, Rewrite]:
    definitions = Definitions(function)
    norms = {arguments_of(b.value)["x"]: b for b in reversed(definitions.bindings) if RMS_NORM.matches(b.value)}
    found: dict[relax.Var, Rewrite] = {}
    for binding in definitions.bindings:
        add = definitions.call(binding.value, "relax.add")
        if add is None or binding.var not in norms:
            continue
        norm = norms[binding.var]
        residual, x = add.args
        if not (same_type(residual, x) and definitions.is_parameter(arguments_of(norm.value)["weight"])):
            continue

        def rewrite(emit, binding=binding, norm=norm, residual=residual, x=x):
            weight = arguments_of(norm.value)["weight"]
            pair = emit(ADD_RMS_NORM({"x": x, "residual": residual, "weight": weight}, eps=norm.value.attrs["eps"]))
            return {binding.var: relax.TupleGetItem(pair, 0), norm.var: relax.TupleGetItem(pair, 1)}

        found[binding.var] = rewrite
    return found
