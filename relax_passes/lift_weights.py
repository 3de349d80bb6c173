"""What is computed from weights alone moves to a function of its own, run once at compile time."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
from tvm import relax

from .base import Definitions, clean, counted_pass, new_name, substitute, used_vars
from .outline_layers import FORWARD, LOGITS

WEIGHTS = "weights"


@dataclass(frozen=True)
class _Split:
    """A function's bindings: those that depend on weights alone, and the others."""

    once: list[relax.VarBinding]
    always: list[relax.VarBinding]
    frontier: dict[relax.Var, str]  # weights, plain or computed `once`, that `always` uses, with names for them


@counted_pass("lift_weights")
def lift_weights(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Split the program into what runs once, on the checkpoint, and what runs at each call.

    Before:
        layer_0(x, ..., wq, wk, wv): w = concat([wq, wk, wv]); y = linear(x, w); ...
        forward(..., weights of the checkpoint...): h = layer_0(x, ..., wq_0, wk_0, wv_0); ...
    After:
        weights(weights of the checkpoint...): return (concat([wq_0, wk_0, wv_0]), ...)
        layer_0(x, ..., w): y = linear(x, w); ...
        forward(..., stored weights...): h = layer_0(x, ..., w_0); ...
    Weight parameters of `forward` and `logits` bear the names of the fields of `weights`, which
    its attribute `stored` lists.  Matches are the computations that moved.
    """
    builder = relax.BlockBuilder(tvm.IRModule({}, attrs=module.attrs))
    forward, logits = module[FORWARD], module[LOGITS]
    inputs = 1 + [p.name for p in forward.params].index("slot_mapping")
    forward = _lift_from_layers(module, builder, forward, set(forward.params[inputs:]))
    once: list[relax.VarBinding] = []
    sources: dict[str, relax.Var] = {}
    stored: dict[str, relax.Var] = {}
    names = {p.name for p in (*forward.params, *logits.params)}
    for name, function, kept in ((FORWARD, forward, inputs), (LOGITS, logits, 1)):
        weights = function.params[kept:]
        split = _split(function, set(weights), names)
        # Both functions may take the same weight (tied embeddings): in `weights` it is one parameter.
        shared = {p: sources.setdefault(p.name, p) for p in weights}
        once += [relax.VarBinding(b.var, substitute(b.value, shared)) for b in split.once]
        stored.update({field: shared.get(v, v) for v, field in split.frontier.items()})
        builder.add_func(_keep(function, list(function.params[:kept]), split), name)
    builder.add_func(_weights_function(list(sources.values()), once, stored), WEIGHTS)
    return clean(builder.get()), len(once)


def _lift_from_layers(
    module: tvm.IRModule, builder: relax.BlockBuilder, forward: relax.Function, weights: set[relax.Var]
) -> relax.Function:
    """Add the layer functions without their weight-only bindings; these go to the call sites in `forward`."""
    lifted: dict[tvm.ir.GlobalVar, tuple[_Split, list[bool], tvm.ir.GlobalVar]] = {}
    bindings: list[relax.VarBinding] = []
    known = set(weights)  # and what `forward` computes from them alone
    for binding in Definitions(forward).bindings:
        call = binding.value
        if not (isinstance(call, relax.Call) and isinstance(call.op, tvm.ir.GlobalVar)):
            bindings.append(binding)
            if (used := set(used_vars(call))) and used <= known:
                known.add(binding.var)
            continue
        layer = module[call.op]
        if call.op not in lifted:
            constant = [argument in known for argument in call.args]
            constants = {p for p, c in zip(layer.params, constant, strict=True) if c}
            split = _split(layer, constants, {p.name for p in layer.params})
            kept = [p for p, c in zip(layer.params, constant, strict=True) if not c]
            lifted[call.op] = (split, constant, builder.add_func(_keep(layer, kept, split), call.op.name_hint))
        split, constant, callee = lifted[call.op]
        values = dict(zip(layer.params, call.args, strict=True))
        for inner in split.once:
            values[inner.var] = relax.DataflowVar(inner.var.name, inner.var.ty)
            bindings.append(relax.VarBinding(values[inner.var], substitute(inner.value, values)))
        arguments = [a for a, c in zip(call.args, constant, strict=True) if not c]
        call = relax.Call(callee, [*arguments, *(values[v] for v in split.frontier)])
        bindings.append(relax.VarBinding(binding.var, call))
    body = relax.SeqExpr([relax.DataflowBlock(bindings)], forward.body.body)
    return relax.Function(forward.params, body, forward.ret_ty, attrs=forward.attrs)


def _split(function: relax.Function, weights: set[relax.Var], names: set[str]) -> _Split:
    """See `_Split`; `names` are taken, and those that it gives are added."""
    sources = {weight: [weight.name] for weight in weights}
    once, always = [], []
    for binding in Definitions(function).bindings:
        used = used_vars(binding.value)
        if used and all(v in sources for v in used):
            sources[binding.var] = list(dict.fromkeys(name for v in used for name in sources[v]))
            once.append(binding)
        else:
            always.append(binding)
    frontier = dict.fromkeys((v for b in always for v in used_vars(b.value) if v in sources), "")
    for v in frontier:
        frontier[v] = v.name if v in weights else new_name(_merged_name(sources[v]), names)
    return _Split(once, always, frontier)


def _merged_name(sources: list[str]) -> str:
    """`a_q_proj`, `a_k_proj`, `a_v_proj` -> `a_q_k_v_proj`: what they have in common stands once."""
    words = [name.split("_") for name in sources]
    shortest = min(map(len, words))
    same = [len(set(column)) == 1 for column in zip(*words, strict=False)]
    head = (*same, False).index(False) if len(sources) > 1 else 0
    tail = 0
    while tail < shortest - head - 1 and len({name[-1 - tail] for name in words}) == 1:
        tail += 1
    middle = [word for name in words for word in name[head : len(name) - tail]]
    return "_".join([*words[0][:head], *middle, *words[0][len(words[0]) - tail :]])


def _keep(function: relax.Function, kept: list[relax.Var], split: _Split) -> relax.Function:
    """What is left of a function: the parameters `kept`, its frontier under new names, the other bindings."""
    parameters = {v: relax.Var(name, v.ty) for v, name in split.frontier.items()}
    body = substitute(relax.SeqExpr([relax.DataflowBlock(split.always)], function.body.body), parameters)
    return relax.Function([*kept, *parameters.values()], body, function.ret_ty, attrs=function.attrs)


def _weights_function(
    sources: list[relax.Var], once: list[relax.VarBinding], stored: dict[str, relax.Var]
) -> relax.Function:
    result = relax.Tuple(list(stored.values()))
    out = relax.Var("stored", relax.TupleType([v.ty for v in stored.values()]))
    body = relax.SeqExpr([relax.DataflowBlock([*once, relax.VarBinding(out, result)])], out)
    function = relax.utils.copy_with_new_vars(relax.Function(sources, body, out.ty))
    return function.with_attrs({"global_symbol": WEIGHTS, "stored": list(stored)})
