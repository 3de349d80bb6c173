"""Linear layers that read the same activations: one matrix product on one merged weight."""

from __future__ import annotations

import tvm
from tvm import relax

from vllm_compile.ops import LINEAR
from vllm_compile.ops.base import arguments_of

from .base import Definitions, Rewrite, counted_pass, rewrite_functions


@counted_pass("merge_qkv")
def merge_qkv(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Merge the projections of q, k and v (or any other parallel linear layers).

    Before:
        q, k, v = linear(x, wq), linear(x, wk), linear(x, wv)
    After:
        q, k, v = split(linear(x, concat([wq, wk, wv], axis=0)), axis=-1)
    Biases are merged alike; layers with and without one are not merged with each other.
    """
    return rewrite_functions(module, _find)


def _find(function: relax.Function) -> dict[relax.Var, Rewrite]:
    groups: dict[tuple[relax.Var, bool], list[relax.VarBinding]] = {}
    definitions = Definitions(function)
    for binding in definitions.bindings:
        if LINEAR.matches(binding.value):
            inputs = arguments_of(binding.value)
            weights = [inputs[name] for name in ("weight", "bias") if name in inputs]
            if "residual" not in inputs and all(map(definitions.is_parameter, weights)):
                groups.setdefault((inputs["x"], "bias" in inputs), []).append(binding)
    return {group[0].var: _merge(group) for group in groups.values() if len(group) > 1}


def _merge(group: list[relax.VarBinding]) -> Rewrite:
    def rewrite(emit):
        parts = [arguments_of(b.value) for b in group]
        merged: dict[str, relax.Expr] = {
            name: emit(relax.op.concat([part[name] for part in parts], axis=0))
            for name in ("weight", "bias")
            if name in parts[0]
        }
        product = emit(LINEAR({"x": parts[0]["x"], **merged}))
        rows = [int(part["weight"].ty.shape.values[0]) for part in parts]
        starts = [sum(rows[: i + 1]) for i in range(len(rows) - 1)]
        split = emit(relax.op.split(product, starts, axis=-1))
        return {b.var: relax.TupleGetItem(split, i) for i, b in enumerate(group)}

    return rewrite
