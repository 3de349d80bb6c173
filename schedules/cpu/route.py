"""The router of a mixture of experts: softmax and the largest k of each token, then a counting sort by expert.

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
from .vector_math import exp
from .vectors import scratch

# A token takes a microsecond or two, waking OpenMP's threads 2 to 5.
PARALLEL_TOKENS = 16
RESULTS = ("experts", "scores", "order", "ends")


def route(
    num_experts: int, top_k: int, normalise: bool, groups: int, kept: int, dtype: str, parallel: bool
) -> tirx.PrimFunc:
    """logits [T, E] -> experts, scores, order, ends [T, k]; of the `kept` best of `groups` groups, if that is not 0."""
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        handles = [T.arg(name, T.handle()) for name in ("logits", *RESULTS)]
        tokens = T.int64()
        logits = T.match_buffer(handles[0], (tokens, num_experts), dtype, align=DTYPE_BYTES[dtype])
        experts, scores, order, ends = (
            T.match_buffer(handle, (tokens, top_k), "float32" if name == "scores" else "int32", align=4)
            for handle, name in zip(handles[1:], RESULTS, strict=True)
        )
        with (T.parallel if parallel else T.serial)(0, tokens) as t:
            row = _row(logits, t, num_experts)
            left = _left(row, num_experts, groups, kept)
            _choose(row, left, experts, scores, t, num_experts, top_k, normalise)
        slots = T.Bind(tokens * top_k)
        _sort(_flat(experts, slots), _flat(order, slots), _flat(ends, slots), slots, num_experts)
    return builder.get()


def _flat(buffer: tirx.Buffer, size: tirx.Expr) -> tirx.Buffer:
    return T.decl_buffer((size,), "int32", data=buffer.data, align=4)


def _row(logits: tirx.Buffer, t: tirx.Var, E: int) -> tirx.Buffer:
    """The logits of one token, float32."""
    row = scratch(E, "float32")
    with T.serial(0, T.int64(E)) as e:
        T.buffer_store(row, T.Cast("float32", logits[t, e]), [e])
    return row


def _left(row: tirx.Buffer, E: int, groups: int, kept: int) -> tirx.Buffer:
    """1 for each expert that can be chosen: all, or those of the groups that are kept."""
    left = scratch(E, "int32")
    if not groups:
        with T.serial(0, T.int64(E)) as e:
            T.buffer_store(left, T.int32(1), [e])
        return left
    size = T.int64(E // groups)
    best, out = scratch(groups, "float32"), scratch(groups, "int32")  # of each group; 1: not kept
    with T.serial(0, T.int64(groups)) as g:
        T.buffer_store(out, T.int32(1), [g])
        T.buffer_store(best, row[g * size], [g])
        with T.serial(1, size) as e:
            T.buffer_store(best, T.max(best[g], row[g * size + e]), [g])
    for _ in range(kept):
        _take_largest(best, out, groups)
    with T.serial(0, T.int64(E)) as e:
        T.buffer_store(left, 1 - out[T.truncdiv(e, size)], [e])
    return left


def _take_largest(values: tirx.Buffer, left: tirx.Buffer, count: int) -> tirx.Expr:
    """The first of the largest values that are `left`, which it no longer is.  With a NaN it still is one of them."""
    best = scratch(1, "int32")
    T.buffer_store(best, T.int32(-1), [0])
    with T.serial(0, T.int64(count)) as i:
        larger = T.Or(best[0] < 0, values[i] > values[T.Cast("int64", T.max(best[0], T.int32(0)))])
        with build.If(T.And(left[i] == 1, larger)), build.Then():
            T.buffer_store(best, T.Cast("int32", i), [0])
    T.buffer_store(left, T.int32(0), [T.Cast("int64", best[0])])
    return best[0]


def _choose(
    row: tirx.Buffer,
    left: tirx.Buffer,
    experts: tirx.Buffer,
    scores: tirx.Buffer,
    t: tirx.Var,
    E: int,
    top_k: int,
    normalise: bool,
) -> None:
    """The experts of one token, and their scores, which are NaN where one of its logits is."""
    total = scratch(2, "float32")
    for j in range(top_k):
        T.buffer_store(experts, _take_largest(row, left, E), [t, j])
    # The softmax, at the experts that were chosen, the first of which has the largest logit.
    largest = row[T.Cast("int64", experts[t, 0])]

    def exponential(e: tirx.Expr) -> tirx.Expr:
        return exp(row[e] - largest)

    T.buffer_store(total, T.float32(0), [0])
    with T.serial(0, T.int64(E)) as e:
        T.buffer_store(total, total[0] + exponential(e), [0])
    T.buffer_store(total, T.float32(0), [1])
    for j in range(top_k):
        T.buffer_store(scores, exponential(T.Cast("int64", experts[t, j])) / total[0], [t, j])
        T.buffer_store(total, total[1] + scores[t, j], [1])
    if normalise:
        for j in range(top_k):
            T.buffer_store(scores, scores[t, j] / total[1], [t, j])


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
    """`route` for any number of experts and of equal groups of them, logits float32 or bfloat16."""

    name: str = "cpu.route"
    op: str = "route"

    @property
    def options(self) -> frozenset[str]:
        return frozenset({"groups", "kept"})

    def serves(self, spec: OpSpec, target: Target) -> bool:
        logits = spec.input("logits")
        return spec.op == self.op and logits.shape[0] == Sym.TOKENS and spec.attribute("top_k") <= logits.size(1)

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        return (Variant(1, {"parallel": False}), Variant(PARALLEL_TOKENS, {"parallel": True}))

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        logits = spec.input("logits")
        top_k, normalise = spec.attribute("top_k"), bool(spec.attribute("normalise"))
        groups, kept = spec.option("groups"), spec.option("kept")
        return route(logits.size(1), top_k, normalise, groups, kept, logits.dtype, config["parallel"])
