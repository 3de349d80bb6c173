"""A mixture of experts becomes its router, which sorts tokens by expert, and two linear layers of experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import inf, prod
from typing import Any

import tvm
from tvm import relax, tirx

from vllm_compile.ops import EXPERT_GATE_UP_SILU, EXPERT_LINEAR, LIMIT_GROUPS, MOE, ROUTE
from vllm_compile.ops.base import arguments_of, attributes_of

from .base import Definitions, Rewrite, counted_pass, rewrite_functions


@dataclass(frozen=True)
class _Router:
    """What a router computes: the logits it chooses by and what is added to scores before, and the factor at last."""

    logits: relax.Expr
    bias: relax.Expr | None
    scale: float
    attributes: dict[str, Any]  # of `route`


@dataclass(frozen=True)
class _Choice:
    """What experts are chosen by: values of all of them, a bias, groups that are kept; and the choice."""

    values: relax.Expr
    bias: relax.Expr | None
    groups: dict[str, int]
    top: relax.Call


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
    A model that does not divide by the sum has `normalise=False`, and so on for the other options of `route`: sigmoid
    for softmax, experts that are chosen by the sum of score and bias (their scores gathered then), groups of experts
    that are kept (`limit_groups`), a divisor that is not too small.  The softmax of the k largest logits alone is
    `normalise=True`.  A constant that scores are multiplied by at last stays an operator of its own.  A router of
    another kind, or one whose scores are not float32, stays as it is.
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
    choice = _choice(d, chosen.tuple_value) if isinstance(chosen, relax.TupleGetItem) and chosen.index == 1 else None
    if choice is None:
        return None
    values, scale = _unscaled(d, d.value(_uncast(d, scores)))
    attributes = {"top_k": int(choice.top.ty.fields[0].shape.values[-1]), **choice.groups}
    kind = _kind(d, choice.values)
    if kind is None:
        largest = d.operand(values, "relax.nn.softmax") if _kind(d, values) == "relax.nn.softmax" else None
        of_all = choice.bias is not None or choice.groups
        if of_all or largest is None or not _is_chosen(d, d.value(_uncast(d, largest)), chosen, choice):
            return None
        return _Router(_uncast(d, choice.values), None, scale, attributes | {"normalise": True})
    divisor = _divisor(d, values)
    if divisor is not None:
        values = d.value(d.operand(values, "relax.divide"))
    if divisor == {} or not _is_chosen(d, values, chosen, choice):
        return None
    attributes |= divisor or {"normalise": False}
    logits = _uncast(d, d.operand(choice.values, kind))
    return _Router(logits, choice.bias, scale, attributes | {"sigmoid": int(kind == "relax.sigmoid")})


def _choice(d: Definitions, chosen: relax.Expr) -> _Choice | None:
    """The choice of the largest k in each row of [T, E] that `chosen` is."""
    top = d.call(chosen, "relax.topk")
    if top is None or not top.attrs.largest or str(top.attrs.ret_type) != "both":
        return None
    seen, groups = top.args[0], {}
    if LIMIT_GROUPS.matches(d.value(seen)):
        groups, seen = attributes_of(d.value(seen)), d.value(seen).args[0]
    shape = seen.ty.shape.values
    if len(shape) != 2 or int(top.attrs.axis) % 2 != 1:
        return None
    values, bias = d.call(seen, "relax.add").args if d.call(seen, "relax.add") is not None else (seen, None)
    if bias is not None:
        sizes = bias.ty.shape.values
        if str(bias.ty.dtype) != "float32" or not all(isinstance(size, tirx.IntImm) for size in sizes):
            return None
        if prod(map(int, sizes)) != int(shape[1]):
            return None
    if groups:
        enough = groups["kept"] * (int(shape[1]) // groups["groups"])
        # Where the groups have fewer experts, the rest is anyone's; so it is where a zero may be more than a sum.
        if int(top.ty.fields[0].shape.values[1]) > enough or (groups.pop("zeros", 0) and bias is not None):
            return None
    return _Choice(values, bias, groups, top)


def _kind(d: Definitions, scores: relax.Expr) -> str | None:
    """The operator that makes scores of logits, if it does so in float32: softmax over the last axis, or sigmoid."""
    for kind in ("relax.nn.softmax", "relax.sigmoid"):
        call = d.call(scores, kind)
        if call is not None and str(call.ty.dtype) == "float32":
            return kind if kind == "relax.sigmoid" or int(call.attrs.axis) % 2 == 1 else None
    return None


def _is_chosen(d: Definitions, values: relax.Expr, experts: relax.Expr, choice: _Choice) -> bool:
    """Whether `values` are those of all, without the bias, at the experts that were chosen."""
    if isinstance(values, relax.TupleGetItem):
        return values.index == 0 and choice.bias is None and d.value(values.tuple_value).same_as(choice.top)
    gathered = d.call(values, "relax.gather_elements")
    if gathered is None or int(gathered.attrs.axis) % 2 != 1:
        return False
    source, index = d.value(gathered.args[0]), d.value(_uncast(d, gathered.args[1]))
    return bool(source.same_as(d.value(choice.values)) and index.same_as(experts))


def _divisor(d: Definitions, values: relax.Expr) -> dict[str, Any] | None:
    """What scores are divided by, as options of `route`; {} if it is not about their sum, None if by nothing."""
    divided = d.call(values, "relax.divide")
    if divided is None:
        return None
    options: dict[str, Any] = {"normalise": True}
    total = divided.args[1]
    if (clipped := d.call(total, "relax.clip")) is not None:
        if float(clipped.args[2].value) != inf:
            return {}
        options["least"], total = float(clipped.args[1].value), clipped.args[0]
    epsilon = d.constant(d.operand(total, "relax.add", 1))
    if epsilon is not None:
        options["epsilon"], total = epsilon, d.operand(total, "relax.add")
    summed = d.call(total, "relax.sum")
    same = summed is not None and d.value(summed.args[0]).same_as(d.value(divided.args[0]))
    return options if same and _is_over_last(summed) else {}


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
    bias = None if router.bias is None else emit(relax.op.reshape(router.bias, [prod(router.bias.ty.shape.values)]))
    route = emit(ROUTE({"logits": router.logits, "bias": bias}, **router.attributes))
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
