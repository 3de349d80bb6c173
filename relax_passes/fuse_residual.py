"""A residual add right behind a linear layer becomes that layer's epilogue."""

from __future__ import annotations

import tvm
from tvm import relax

from vllm_compile.ops import LINEAR
from vllm_compile.ops.base import arguments_of

from .base import Definitions, Rewrite, counted_pass, replace_by, rewrite_functions, same_type


@counted_pass("fuse_residual")
def fuse_residual(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Add while the products are still in registers.

    Before:
        y = linear(x, weight)
        z = add(residual, y)
    After:
        z = linear(x, weight, residual=residual)
    """
    return rewrite_functions(module, _find)


def _find(function: relax.Function) -> dict[relax.Var, Rewrite]:
    definitions = Definitions(function)
    found: dict[relax.Var, Rewrite] = {}
    for binding in definitions.bindings:
        add = definitions.call(binding.value, "relax.add")
        for residual, y in (tuple(add.args), tuple(add.args)[::-1]) if add is not None else ():
            linear = definitions.value(y)
            fits = LINEAR.matches(linear) and "residual" not in arguments_of(linear) and same_type(residual, y)
            if fits and definitions.uses(y) == 1:
                inputs = {**arguments_of(linear), "residual": residual}
                found[binding.var] = replace_by(binding.var, LINEAR(inputs))
                break
    return found
