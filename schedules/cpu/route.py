"""The router of a mixture of experts: scores and the best k of each token, then a counting sort by expert.

Bytes: T * E * size of logits, T * k * 16 of results; T * E exponentials and T * E * k comparisons.  For 2,048 tokens,
128 experts and k = 8 some 2 million comparisons, a thousandth of the experts' own work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import DTYPE_BYTES, OpSpec, Sym
from vllm_compile.targets import Target

from ..family import Config, KernelFamily, Variant
from ..vector_math import exp
from .vectors import scratch

# A token takes a microsecond or two, waking OpenMP's threads 2 to 5.
PARALLEL_TOKENS = 16
RESULTS = ("experts", "scores", "order", "ends")


@dataclass(frozen=True)
class _Router:
    """What a call of `route` asks for; see the operator."""

    experts: int
    top_k: int
    normalise: bool
    biased: bool
    sigmoid: bool
    groups: int
    kept: int
    best: int
    epsilon: float
    least: float


def route(router: _Router, dtype: str, parallel: bool) -> tirx.PrimFunc:
    """logits [T, E], bias [E] if there is one -> experts, scores, order, ends [T, k]."""
    E, top_k = router.experts, router.top_k
    names = ("logits", *(["bias"] if router.biased else []), *RESULTS)
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        handles = {name: T.arg(name, T.handle()) for name in names}
        tokens = T.int64()
        logits = T.match_buffer(handles["logits"], (tokens, E), dtype, align=DTYPE_BYTES[dtype])
        bias = T.match_buffer(handles["bias"], (E,), "float32", align=4) if router.biased else None
        experts, scores, order, ends = (
            T.match_buffer(handles[name], (tokens, top_k), "float32" if name == "scores" else "int32", align=4)
            for name in RESULTS
        )
        with (T.parallel if parallel else T.serial)(0, tokens) as t:
            row = _row(logits, t, E)
            all_scores = _sigmoid(row, E) if router.sigmoid else _softmax(row, E)
            seen = all_scores if router.sigmoid or router.best > 1 else row
            if bias is not None:
                seen = _sum(all_scores, bias, E)
            left = _left(seen, router)
            for j in range(top_k):
                T.buffer_store(experts, _take_largest(seen, left, E), [t, j])
            _score(all_scores, experts, scores, t, router)
        slots = T.Bind(tokens * top_k)
        _sort(_flat(experts, slots), _flat(order, slots), _flat(ends, slots), slots, E)
    return builder.get()


def _flat(buffer: tirx.Buffer, size: tirx.Expr) -> tirx.Buffer:
    return T.decl_buffer((size,), "int32", data=buffer.data, align=4)


def _row(logits: tirx.Buffer, t: tirx.Var, E: int) -> tirx.Buffer:
    """The logits of one token, float32."""
    row = scratch(E, "float32")
    with T.serial(0, T.int64(E)) as e:
        T.buffer_store(row, T.Cast("float32", logits[t, e]), [e])
    return row


def _softmax(row: tirx.Buffer, E: int) -> tirx.Buffer:
    """All of them NaN where one of the logits is."""
    scores, of_all = scratch(E, "float32"), scratch(2, "float32")  # the largest, and the sum
    T.buffer_store(of_all, row[0], [0])
    T.buffer_store(of_all, T.float32(0), [1])
    with T.serial(1, T.int64(E)) as e:
        T.buffer_store(of_all, T.max(of_all[0], row[e]), [0])
    with T.serial(0, T.int64(E)) as e:
        T.buffer_store(scores, exp(row[e] - of_all[0]), [e])
        T.buffer_store(of_all, of_all[1] + scores[e], [1])
    with T.serial(0, T.int64(E)) as e:
        T.buffer_store(scores, scores[e] / of_all[1], [e])
    return scores


def _sigmoid(row: tirx.Buffer, E: int) -> tirx.Buffer:
    scores = scratch(E, "float32")
    with T.serial(0, T.int64(E)) as e:
        T.buffer_store(scores, T.float32(1) / (T.float32(1) + exp(T.float32(0) - row[e])), [e])
    return scores


def _sum(scores: tirx.Buffer, bias: tirx.Buffer, E: int) -> tirx.Buffer:
    seen = scratch(E, "float32")
    with T.serial(0, T.int64(E)) as e:
        T.buffer_store(seen, scores[e] + bias[e], [e])
    return seen


def _left(seen: tirx.Buffer, router: _Router) -> tirx.Buffer:
    """1 for each expert that can be chosen: all, or those of the groups that are kept."""
    E, groups = router.experts, router.groups
    left = scratch(E, "int32")
    with T.serial(0, T.int64(E)) as e:
        T.buffer_store(left, T.int32(1), [e])
    if not groups:
        return left
    size = E // groups
    good, out = scratch(groups, "float32"), scratch(groups, "int32")  # of each group; 1: not kept
    with T.serial(0, T.int64(groups)) as g:
        T.buffer_store(out, T.int32(1), [g])
        T.buffer_store(good, T.float32(0), [g])
        for _ in range(router.best):
            taken = _take_largest(seen, left, size, g * size)
            T.buffer_store(good, good[g] + seen[T.Cast("int64", taken)], [g])
    for _ in range(router.kept):
        _take_largest(good, out, groups)
    with T.serial(0, T.int64(E)) as e:
        T.buffer_store(left, 1 - out[T.truncdiv(e, T.int64(size))], [e])
    return left


def _take_largest(values: tirx.Buffer, left: tirx.Buffer, count: int, first: tirx.Expr | int = 0) -> tirx.Expr:
    """The first of the largest of `count` values that are `left`, which it no longer is.

    With a NaN it still is one of them.
    """
    best = scratch(1, "int32")
    T.buffer_store(best, T.int32(-1), [0])
    with T.serial(0, T.int64(count)) as i:
        at = i + first
        larger = T.Or(best[0] < 0, values[at] > values[T.Cast("int64", T.max(best[0], T.int32(0)))])
        with build.If(T.And(left[at] == 1, larger)), build.Then():
            T.buffer_store(best, T.Cast("int32", at), [0])
    T.buffer_store(left, T.int32(0), [T.Cast("int64", best[0])])
    return best[0]


def _score(all_scores: tirx.Buffer, experts: tirx.Buffer, scores: tirx.Buffer, t: tirx.Var, router: _Router) -> None:
    """The scores of the experts of one token."""
    total = scratch(1, "float32")
    T.buffer_store(total, T.float32(0), [0])
    for j in range(router.top_k):
        T.buffer_store(scores, all_scores[T.Cast("int64", experts[t, j])], [t, j])
        T.buffer_store(total, total[0] + scores[t, j], [0])
    if router.normalise:
        if router.epsilon:
            T.buffer_store(total, total[0] + T.float32(router.epsilon), [0])
        if router.least:
            T.buffer_store(total, T.Select(total[0] < T.float32(router.least), T.float32(router.least), total[0]), [0])
        for j in range(router.top_k):
            T.buffer_store(scores, scores[t, j] / total[0], [t, j])


def _sort(experts: tirx.Buffer, order: tirx.Buffer, ends: tirx.Buffer, slots: tirx.Expr, E: int) -> None:
    """A counting sort of the slots by expert; `places` is where each expert's next slot goes, at last its end."""
    places = scratch(E + 1, "int32")
    with T.serial(0, T.int64(E + 1)) as e:
        T.buffer_store(places, T.int32(0), [e])
    with T.serial(0, slots) as s:
        behind = T.Cast("int64", experts[s]) + 1
        T.buffer_store(places, places[behind] + 1, [behind])
    with T.serial(0, T.int64(E)) as e:
        T.buffer_store(places, places[e] + places[e + 1], [e + 1])
    with T.serial(0, slots) as s:
        expert = T.Cast("int64", experts[s])
        T.buffer_store(order, T.Cast("int32", s), [T.Cast("int64", places[expert])])
        T.buffer_store(places, places[expert] + 1, [expert])
    with T.serial(0, slots) as s:
        T.buffer_store(ends, places[T.Cast("int64", experts[T.Cast("int64", order[s])])], [s])


@dataclass(frozen=True)
class Route(KernelFamily):
    """`route` for any number of experts and of equal groups of them; logits float32 or bfloat16, a bias float32."""

    name: str = "cpu.route"
    op: str = "route"

    @property
    def options(self) -> frozenset[str]:
        return frozenset({"sigmoid", "groups", "kept", "best", "epsilon", "least"})

    def serves(self, spec: OpSpec, target: Target) -> bool:
        logits = spec.input("logits")
        return spec.op == self.op and logits.shape[0] == Sym.TOKENS and spec.attribute("top_k") <= logits.size(1)

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        return (Variant(1, {"parallel": False}), Variant(PARALLEL_TOKENS, {"parallel": True}))

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        logits = spec.input("logits")
        router = _Router(
            experts=logits.size(1),
            top_k=spec.attribute("top_k"),
            normalise=bool(spec.attribute("normalise")),
            biased=spec.has_input("bias"),
            sigmoid=bool(spec.option("sigmoid")),
            groups=spec.option("groups"),
            kept=spec.option("kept"),
            best=spec.option("best") or 1,
            epsilon=spec.option("epsilon"),
            least=spec.option("least"),
        )
        return route(router, logits.dtype, config["parallel"])
