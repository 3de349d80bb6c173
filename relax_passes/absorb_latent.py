"""Where keys and values are linear in one latent vector, that is what is cached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax

from vllm_compile.ops import HEAD_LINEAR, KV_CACHE_WRITE, LINEAR, PAGED_ATTENTION
from vllm_compile.ops.base import arguments_of, attributes_of

from .base import Definitions, Rewrite, clean, counted_pass, replace_bindings

HEADS_TO_ROWS = [0, 2, 1, 3]  # swaps the axes of tokens and heads, both ways


@dataclass(frozen=True)
class _Latent:
    """Keys and values as they are made: of `latent` [1, 1, T, R] by `weight` [H * (N + V), R], N of a head first.

    `rotated` [1, 1, T, P], the same for all heads, is the rest of the keys; the queries are `plain` [1, H, T, N] and
    `turned` [1, H, T, P].
    """

    latent: relax.Expr
    weight: relax.Expr
    rotated: relax.Expr
    plain: relax.Expr
    turned: relax.Expr
    key: int
    value: int

    @property
    def heads(self) -> int:
        return int(self.plain.ty.shape.values[1])

    @property
    def rank(self) -> int:
        return int(self.weight.ty.shape.values[1])

    @property
    def columns(self) -> int:
        """Of the cache: the latent vector, and what is rotated."""
        return self.rank + int(self.rotated.ty.shape.values[-1])


@counted_pass("absorb_latent")
def absorb_latent(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Cache what keys and values are made of (multi-head latent attention, DeepSeek-AI 2024, section 2.1).

    Before:
        k, v = split(linear(c, w), by head)
        kv = kv_cache_write(concat(k, broadcast(k_rotated)), v, kv_i, slot_mapping)
        o = paged_attention(concat(q, q_rotated), kv, ...)
    After:
        kv = kv_cache_write(concat(c, k_rotated), kv_i, slot_mapping)
        q_c = head_linear(q, w's rows of k, transposed)
        o_c = paged_attention(concat(q_c, q_rotated), kv, ..., shared_values=width of c)
        o = head_linear(o_c, w's rows of v)
    For q . (W c) = (W^T q) . c, and a weighted sum of V c is V times that of c: the cache has one head of keys, whose
    first columns are the values.  Only where that makes it smaller.
    """
    function = module["main"]
    d = Definitions(function)
    caches: dict[relax.Var, relax.Var] = {}
    at: dict[relax.Var, Rewrite] = {}
    for binding in d.bindings:
        attention = arguments_of(binding.value) if PAGED_ATTENTION.matches(binding.value) else {}
        write = d.value(attention["kv"]) if attention else None
        made = _match(d, attention["q"], arguments_of(write)) if KV_CACHE_WRITE.matches(write) else None
        if made is not None:
            written = arguments_of(write)
            cache = _cache(written["kv"], made)
            caches[written["kv"]] = cache

            def rewrite(emit, binding=binding, made=made, slots=written["slot_mapping"], cache=cache):
                return {binding.var: _absorbed(emit, made, binding.value, cache, slots)}

            at[binding.var] = rewrite
    if not at:
        return module, 0
    rewritten = replace_bindings(module, function, at)
    parameters = [caches.get(parameter, parameter) for parameter in function.params]
    module.update_func(
        module.get_global_var("main"),
        relax.Function(parameters, rewritten.body, rewritten.ret_ty, attrs=function.attrs),
    )
    return clean(module), len(at)


def _cache(by_head: relax.Var, made: _Latent) -> relax.Var:
    """The parameter that takes the place of a cache of keys and values by head."""
    blocks, _, block_size, _ = by_head.ty.shape.values
    return relax.Var(by_head.name, relax.TensorType([blocks, 1, block_size, made.columns], by_head.ty.dtype))


def _match(d: Definitions, queries: relax.Expr, written: dict[str, relax.Expr]) -> _Latent | None:
    if "v" not in written:
        return None
    q, k = (_pair(d, _by_head(d, rows)) for rows in (queries, written["k"]))
    v = _by_head(d, written["v"])
    if q is None or k is None or v is None:
        return None
    rotated = d.operand(k[1], "relax.broadcast_to")
    parts = [_part(d, part) for part in (k[0], v)]
    if rotated is None or [index for _, index in parts] != [0, 1] or not parts[0][0].same_as(parts[1][0]):
        return None
    heads = _by_head(d, parts[0][0])
    product = d.value(d.operand(heads, "relax.reshape"))
    if not LINEAR.matches(product) or set(arguments_of(product)) != {"x", "weight"}:
        return None
    latent, weight = arguments_of(product).values()
    key, value = (_sizes(expr)[-1] for expr in (k[0], v))
    made = _Latent(latent, weight, rotated, *q, key, value)
    once = _sizes(rotated)[1] == 1 and _sizes(latent)[:2] == [1, 1]
    whole = _sizes(heads)[2:] == [made.heads, key + value] and _sizes(q[0])[-1] == key
    smaller = made.columns < made.heads * (key + _sizes(rotated)[-1] + value)
    return made if once and whole and d.is_parameter(weight) and smaller else None


def _by_head(d: Definitions, rows: Any) -> Any:
    """[1, H, T, D] that is permuted to rows [1, T, H, D] (or the other way round), else None."""
    permuted = d.call(rows, "relax.permute_dims")
    return permuted.args[0] if permuted is not None and list(map(int, permuted.attrs.axes)) == HEADS_TO_ROWS else None


def _sizes(expr: relax.Expr) -> list[int]:
    """Extents of the axes; 0 for one that depends on the number of tokens."""
    return [int(dim) if isinstance(dim, tvm.tirx.IntImm) else 0 for dim in expr.ty.shape.values]


def _pair(d: Definitions, expr: Any) -> tuple[Any, Any] | None:
    """The two tensors that are concatenated on the last axis."""
    concat = d.call(expr, "relax.concat")
    fields = [] if concat is None else list(d.value(concat.args[0]).fields)
    return (fields[0], fields[1]) if len(fields) == 2 and int(concat.attrs.axis) in (-1, 3) else None


def _part(d: Definitions, expr: Any) -> tuple[Any, int]:
    """(x, i) if `expr` is part i of a split of x on its last axis in two; else (None, -1)."""
    item = d.value(expr)
    split = d.call(item.tuple_value, "relax.split") if isinstance(item, relax.TupleGetItem) else None
    if split is None or int(split.attrs.axis) not in (-1, 3) or len(split.ty.fields) != 2:
        return None, -1
    return split.args[0], int(item.index)


def _absorbed(emit: Any, made: _Latent, attention: relax.Call, cache: relax.Var, slots: relax.Expr) -> relax.Expr:
    """The result [1, T, H, V]."""
    by_head = emit(relax.op.reshape(made.weight, [made.heads, made.key + made.value, made.rank]))
    into = emit(relax.op.strided_slice(by_head, [1], [0], [made.key], [1]))
    values = emit(relax.op.strided_slice(by_head, [1], [made.key], [made.key + made.value], [1]))
    into = emit(relax.op.permute_dims(into, [0, 2, 1]))
    rows = emit(relax.op.permute_dims(made.plain, HEADS_TO_ROWS))
    queries = emit(HEAD_LINEAR({"x": rows, "weight": into}))
    turned = emit(relax.op.permute_dims(made.turned, HEADS_TO_ROWS))
    keys = emit(relax.op.concat([made.latent, made.rotated], axis=-1))
    written = {"k": emit(relax.op.permute_dims(keys, HEADS_TO_ROWS)), "kv": cache, "slot_mapping": slots}
    inputs = arguments_of(attention) | {
        "q": emit(relax.op.concat([queries, turned], axis=-1)),
        "kv": emit(KV_CACHE_WRITE(written)),
    }
    seen = emit(PAGED_ATTENTION(inputs, **attributes_of(attention), shared_values=made.rank))
    return HEAD_LINEAR({"x": seen, "weight": values})
