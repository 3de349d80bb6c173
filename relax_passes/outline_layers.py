"""The decoder layers become one function, called once per layer.

Everything that follows (fusing, choosing and compiling kernels) then sees one layer,
however deep the model is.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from vllm_compile.errors import UnsupportedError
from vllm_compile.ops import LAYER_BOUNDARY

from .base import Definitions, clean, counted_pass, new_name, substitute, used_vars

FORWARD, LOGITS, LAYER = "forward", "logits", "layer"


@counted_pass("outline_layers")
def outline_layers(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Cut `main` at its layer boundaries; layers that are structurally equal share one function.

    Before:
        main(...): e = embedding(...); x0 = layer_boundary(e, 0); ...; x1 = layer_boundary(h0, 1)
                   n = layer_boundary(rms_norm(...), L + 1); return linear(n, lm_head)
    After:
        layer_0(x, ...): ...
        forward(...): e = embedding(...); h0 = layer_0(e, ...); h1 = layer_0(h0, ...); return rms_norm(...)
        logits(hidden, lm_head): return linear(hidden, lm_head)
    What a layer computes independently of its input is moved to `forward` and computed once.
    Matches are the layers.
    """
    main = module["main"]
    prologue, *layers, epilogue, head = _segments(main)
    builder = relax.BlockBuilder(tvm.IRModule({}, attrs=module.attrs))
    shared: list[tuple[relax.Function, tvm.ir.GlobalVar]] = []
    calls: list[relax.VarBinding] = []
    for index, segment in enumerate(layers):
        hoisted, segment = _hoist(segment)
        prologue += hoisted
        following = layers[index + 1] if index + 1 < len(layers) else epilogue
        result = following[0].value.args[0]
        arguments = _free(segment)
        function = _function(segment, arguments, result, [_local_name(v.name, index) for v in arguments])
        callee = next((var for known, var in shared if tvm_ffi.structural_equal(known, function)), None)
        if callee is None:
            callee = builder.add_func(function, f"{LAYER}_{len(shared)}")
            shared.append((function, callee))
        calls.append(relax.VarBinding(result, relax.Call(callee, arguments)))
    body = [*prologue, *calls, *epilogue]
    hidden = head[0].value.args[0]
    logits = main.body.body
    builder.add_func(_public(_function(body, list(main.params), hidden, None), FORWARD), FORWARD)
    head_arguments = _free(head)
    names = ["hidden", *(v.name for v in head_arguments[1:])]
    builder.add_func(_public(_function(head, head_arguments, logits, names), LOGITS), LOGITS)
    return clean(relax.transform.EliminateCommonSubexpr()(builder.get())), len(layers)


def place(module: tvm.IRModule, name: str) -> str:
    """Where a function stands in the model, in the user's words."""
    functions = {var.name_hint: function for var, function in module.functions_items()}
    if FORWARD not in functions:
        return name
    calls = [b.value.op for b in Definitions(functions[FORWARD]).bindings if isinstance(b.value, relax.Call)]
    layers = [callee.name_hint for callee in calls if isinstance(callee, tvm.ir.GlobalVar)]
    numbers = [str(i) for i, callee in enumerate(layers) if callee == name]
    return f"decoder layer {', '.join(numbers)}" if numbers else f"outside the decoder layers, in {name}"


def _segments(main: relax.Function) -> list[list[relax.VarBinding]]:
    """The bindings of `main`, a new list starting at each layer boundary."""
    segments: list[list[relax.VarBinding]] = [[]]
    for binding in Definitions(main).bindings:
        if LAYER_BOUNDARY.matches(binding.value):
            segments.append([])
        segments[-1].append(binding)
    if len(segments) < 4:
        raise UnsupportedError("the traced model has no layer boundaries; its decoder layers cannot be outlined")
    return segments


def _hoist(segment: list[relax.VarBinding]) -> tuple[list[relax.VarBinding], list[relax.VarBinding]]:
    """Split a layer into what does not depend on its input, and the layer proper."""
    dependent = {segment[0].var}
    hoisted, kept = [], [segment[0]]
    for binding in segment[1:]:
        if dependent.isdisjoint(used_vars(binding.value)):
            hoisted.append(binding)
        else:
            dependent.add(binding.var)
            kept.append(binding)
    return hoisted, kept


def _free(segment: list[relax.VarBinding]) -> list[relax.Var]:
    """Variables that a segment uses and does not define, in order of first use."""
    defined = {binding.var for binding in segment}
    used = dict.fromkeys(var for binding in segment for var in used_vars(binding.value))
    return [var for var in used if var not in defined]


def _function(
    bindings: list[relax.VarBinding], arguments: list[relax.Var], result: relax.Var, names: list[str] | None
) -> relax.Function:
    """A function of `arguments` that runs `bindings` and returns `result`; no two parameters have one name."""
    taken: set[str] = set()
    parameters = [
        relax.Var(new_name(name, taken), var.ty)
        for name, var in zip(names or [v.name for v in arguments], arguments, strict=True)
    ]
    out = relax.Var("result", result.ty)
    block = relax.DataflowBlock([*bindings, relax.VarBinding(out, result)])
    renamed = dict(zip(arguments, parameters, strict=True))
    mutated = substitute(relax.SeqExpr([block], out), renamed, _RemoveBoundaries)
    return relax.utils.copy_with_new_vars(relax.Function(parameters, mutated, result.ty))


def _public(function: relax.Function, name: str) -> relax.Function:
    return function.with_attr("global_symbol", name)


def _local_name(name: str, layer: int) -> str:
    """A parameter's name within the shared function: without the number of the first layer that has it."""
    return name.replace(f"layers_{layer}_", "").replace(f"kv_{layer}", "kv")


@mutator
class _RemoveBoundaries(PyExprMutator):
    """Puts the input of each layer boundary in its place."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        return call.args[0] if LAYER_BOUNDARY.matches(call) else call
