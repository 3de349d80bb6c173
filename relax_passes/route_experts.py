"""A mixture of experts becomes its router, which sorts tokens by expert, and two linear layers of experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import tvm
from tvm import relax

from vllm_compile.ops import EXPERT_GATE_UP_SILU, EXPERT_LINEAR, LIMIT_GROUPS, MOE, ROUTE
from vllm_compile.ops.base import arguments_of, attributes_of

from .base import Definitions, Rewrite, counted_pass, rewrite_functions


@dataclass(frozen=True)
class _Router:
    """What a router computes: the logits it chooses by, how many experts; if scores add up to one, and their factor."""

    logits: relax.Expr
    top_k: int
    normalise: bool
    scale: float
    groups: dict[str, int]  # which of them it keeps first, if it does


@counted_pass("route_experts")
def route_experts(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Sort once what every expert's kernel has to know; weigh and add with plain operators, which are fused.

    Before:
        values, experts = topk(softmax(logits), k)
        y = moe(x, experts, divide(values, sum(values)), gate_up, down)
    After:
        experts, scores, order, ends = route(logits, top_k=k, normalise=True)
        h = expert_gate_up_silu(x, experts, order, ends, gate_up)
        y = sum over j of expert_linear(h, experts, order, ends, down)[:, j] * scores[:, j]
    A model that does not divide by the sum has `normalise=False`; a constant that scores are multiplied by at last
    stays an operator of its own; groups of experts that are kept (`limit_groups`) are options of `route`.  A router of
    another kind, or one whose softmax is not float32, stays as it is.
    """
    return rewrite_functions(module, _find)


def _find(function: relax.Function) -> dict[relax.Var, Rewrite]:
    definitions = Definitions(function)
    found: dict[relax.Var, Rewrite] = {}
    for binding in definitions.bindings:
        if not MOE.matches(binding.value):
            continue
        inputs = arguments_of(binding.value)
        if (router := _router(definitions, inputs["experts"], inputs["scores"])) is not None:

            def rewrite(emit, var=binding.var, inputs=inputs, router=router):
                return {var: _routed(emit, inputs, router)}

            found[binding.var] = rewrite
    return found


def _router(d: Definitions, experts: relax.Expr, scores: relax.Expr) -> _Router | None:
    """The router whose choice `experts` and `scores` are."""
    chosen = d.value(_uncast(d, experts))
    values, scale = _unscaled(d, d.value(_uncast(d, scores)))
    divided = d.call(values, "relax.divide")
    if divided is not None:
        total = d.call(divided.args[1], "relax.sum")
        values = d.value(divided.args[0])
        if total is None or not d.value(total.args[0]).same_as(values) or not _is_over_last(total):
            return None
    both = (chosen, values)
    if not all(isinstance(part, relax.TupleGetItem) for part in both) or (chosen.index, values.index) != (1, 0):
        return None
    top, same = (d.call(part.tuple_value, "relax.topk") for part in both)
    if top is None or not top.same_as(same) or not top.attrs.largest or str(top.attrs.ret_type) != "both":
        return None
    limit = d.value(top.args[0])
    groups = attributes_of(limit) if LIMIT_GROUPS.matches(limit) else {}
    softmax = d.call(limit.args[0] if groups else limit, "relax.nn.softmax")
    rank = len(top.ty.fields[0].shape.values)
    if (
        softmax is None
        or str(softmax.ty.dtype) != "float32"
        or rank != 2
        or {int(top.attrs.axis) % 2, int(softmax.attrs.axis) % 2} != {1}
    ):
        return None
    top_k, experts_in_all = (int(type_.shape.values[-1]) for type_ in (top.ty.fields[0], softmax.ty))
    if groups and top_k > groups["kept"] * (experts_in_all // groups["groups"]):
        return None  # some of those chosen have a score of zero, whichever they are
    return _Router(_uncast(d, softmax.args[0]), top_k, divided is not None, scale, groups)


def _unscaled(d: Definitions, scores: relax.Expr) -> tuple[relax.Expr, float]:
    """What is multiplied by a constant, and the constant."""
    product = d.call(scores, "relax.multiply")
    scale = None if product is None else d.constant(product.args[1])
    return (scores, 1.0) if scale is None else (d.value(product.args[0]), scale)


def _uncast(d: Definitions, expr: relax.Expr) -> relax.Expr:
    """What is cast, if `expr` is a cast."""
    cast = d.operand(expr, "relax.astype")
    return expr if cast is None else cast


def _is_over_last(total: relax.Call) -> bool:
    return bool(total.attrs.keepdims) and [int(axis) % 2 for axis in total.attrs.axis] == [1]


def _routed(emit: Any, inputs: dict[str, relax.Expr], router: _Router) -> relax.Expr:
    route = emit(ROUTE({"logits": router.logits}, top_k=router.top_k, normalise=router.normalise, **router.groups))
    experts, scores, order, ends = (emit(relax.TupleGetItem(route, i)) for i in range(4))
    if router.scale != 1:
        scores = emit(relax.op.multiply(scores, relax.const(router.scale, "float32")))
    groups = {"experts": experts, "order": order, "ends": ends}
    h_TkI = emit(EXPERT_GATE_UP_SILU({"x": inputs["x"], **groups, "weight": inputs["gate_up"]}))
    y_TkD = emit(EXPERT_LINEAR({"x": h_TkI, **groups, "weight": inputs["down"]}))
    return _weighted_sum(emit, y_TkD, emit(_cast(scores, str(inputs["scores"].ty.dtype))), inputs["x"].ty)


def _weighted_sum(emit: Any, y_TkD: relax.Expr, scores_Tk: relax.Expr, result: relax.TensorType) -> relax.Expr:
    """Products in the wider dtype of the two, the sum in float32, rounded once."""
    dtypes = {str(y_TkD.ty.dtype), str(scores_Tk.ty.dtype)}
    wide = dtypes.pop() if len(dtypes) == 1 else "float32"
    scores_Tk1 = emit(relax.op.expand_dims(_cast(scores_Tk, wide), -1))
    weighted = emit(relax.op.multiply(emit(_cast(y_TkD, wide)), scores_Tk1))
    parts = []
    for j in range(int(y_TkD.ty.shape.values[1])):
        part = emit(relax.op.strided_slice(weighted, [1], [j], [j + 1], [1]))
        parts.append(emit(_cast(part, "float32")))
    total = reduce(lambda a, b: emit(relax.op.add(a, b)), parts)
    return relax.op.reshape(emit(_cast(total, str(result.dtype))), result.shape)


def _cast(x: relax.Expr, dtype: str) -> relax.Expr:
    return x if str(x.ty.dtype) == dtype else relax.op.astype(x, dtype)
