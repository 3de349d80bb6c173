"""The two projections of a gated MLP and its SiLU: one operator on one merged weight."""

from __future__ import annotations

import tvm
from tvm import relax

from vllm_compile.ops import GATE_UP_SILU, LINEAR
from vllm_compile.ops.base import arguments_of

from .base import Definitions, Rewrite, counted_pass, rewrite_functions, same_type


@counted_pass("fuse_gate_up")
def fuse_gate_up(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Read x once and keep the two halves in registers.

    Before:
        y = multiply(silu(linear(x, gate)), linear(x, up))
    After:
        y = gate_up_silu(x, concat([gate, up], axis=0))
    """
    return rewrite_functions(module, _find)


def _find(function: relax.Function) -> dict[relax.Var, Rewrite]:
    definitions = Definitions(function)
    found: dict[relax.Var, Rewrite] = {}
    for binding in definitions.bindings:
        product = definitions.call(binding.value, "relax.multiply")
        activated = definitions.operand(definitions.operand(product, "relax.multiply"), "relax.nn.silu")
        if activated is None:
            continue
        gate, up = definitions.value(activated), definitions.value(product.args[1])
        if not (_is_plain(gate) and _is_plain(up) and gate.args[0].same_as(up.args[0])):
            continue
        if not same_type(gate.args[1], up.args[1]):
            continue

        def rewrite(emit, var=binding.var, gate=gate, up=up):
            weight = emit(relax.op.concat([gate.args[1], up.args[1]], axis=0))
            return {var: GATE_UP_SILU({"x": gate.args[0], "weight": weight})}

        found[binding.var] = rewrite
    return found


def _is_plain(expr: relax.Expr) -> bool:
    """True for a linear layer without bias or residual."""
    return LINEAR.matches(expr) and list(arguments_of(expr)) == ["x", "weight"]
