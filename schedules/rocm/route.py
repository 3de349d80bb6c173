"""The router of a mixture of experts: scores and the best k of each token, then a counting sort by expert.

The first launch has a wave a token, whose lanes share the experts.  The second has a thread block an expert: it counts
what comes before its places in the order, and fills them; a thread has a stretch of neighbouring entries, so that the
sort is stable.

Bytes: T * E * size of logits, T * k * 16 of results, and T * k * 8 an expert from L2.  One token is two launches and
their latencies; 8,192 tokens of Mixtral-8x7B (E = 8, k = 2) are 128 KiB of choices a block, 64 entries a thread twice:
some ten microseconds beside the experts' milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import inf
from operator import add
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import DTYPE_BYTES, OpSpec
from vllm_compile.targets.rocm import MOST_THREADS, WAVE, RocmTarget

from ..family import Config, KernelFamily
from ..vector_math import exp
from .intrinsics import block_reduce, wave_reduce, wave_scan

RESULTS = ("experts", "scores", "order", "ends")
MOST_EXPERTS = 16 * WAVE  # a lane has the logits of so many / 64 in registers
WAVES = MOST_THREADS // WAVE
TOGETHER = 4  # entries that a thread requests at a time


def route(E: int, top_k: int, normalise: bool, dtype: str) -> tirx.PrimFunc:
    """logits [T, E] -> experts, scores, order, ends [T, k]."""
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        handles = {name: T.arg(name, T.handle()) for name in ("logits", *RESULTS)}
        tokens = IRBuilder.name("tokens", T.int64())
        logits = T.match_buffer(handles["logits"], (tokens, E), dtype, align=DTYPE_BYTES[dtype])
        shapes = {name: T.match_buffer(handles[name], (tokens, top_k), _dtype(name), align=4) for name in RESULTS}
        slots = T.Bind(tokens * top_k)
        flat = {
            name: IRBuilder.name(name, T.decl_buffer((slots,), _dtype(name), data=buffer.data, align=4))
            for name, buffer in shapes.items()
        }
        _choose(IRBuilder.name("logits", logits), flat, tokens, E, top_k, normalise)
        _sort(flat, slots, E)
    return builder.get()


def _dtype(name: str) -> str:
    return "float32" if name == "scores" else "int32"


def _local(name: str, size: int, dtype: str = "float32") -> tirx.Buffer:
    return IRBuilder.name(name, T.alloc_buffer((size,), dtype, scope="local"))


def _choose(logits: tirx.Buffer, flat: Any, tokens: Any, E: int, top_k: int, normalise: bool) -> None:
    """The launch that chooses; lane l has experts l, l + 64, ..."""
    own = -(-E // WAVE)
    with (
        T.thread_binding(T.ceildiv(tokens, T.int64(WAVES)), thread="blockIdx.x") as block,
        T.thread_binding(MOST_THREADS, thread="threadIdx.x") as thread,
    ):
        lane = T.Bind(thread % WAVE)
        token = T.Bind(block * WAVES + thread // WAVE)
        row = T.Bind(T.min(token, tokens - 1))  # what there is not takes part, and is not written
        values, scores, chosen = _local("values", own), _local("all_scores", own), _local("chosen_scores", top_k)
        left, one = _local("left", own, "int32"), _local("one", 1)  # 1: an expert that can be chosen

        def over_lanes(start: float, term: Callable[[int, Any], Any], combine: Callable[[Any, Any], Any]) -> Any:
            """one[0] = the terms of all experts combined."""
            T.buffer_store(one, T.float32(start), [0])
            for i in range(own):
                T.buffer_store(one, combine(one[0], term(i, i * WAVE + lane)), [0])
            wave_reduce(one, thread, combine)
            return one[0]

        for i in range(own):
            expert = i * WAVE + lane
            value = T.Cast("float32", logits[row, T.min(expert, E - 1)])
            T.buffer_store(values, T.if_then_else(expert < E, value, T.float32(-inf)), [i])
            T.buffer_store(left, T.if_then_else(expert < E, T.int32(1), T.int32(0)), [i])
        largest = over_lanes(-inf, lambda i, _: values[i], T.max)
        for i in range(own):
            T.buffer_store(scores, exp(values[i] - largest), [i])
        total = over_lanes(0, lambda i, _: scores[i], add)
        for i in range(own):
            T.buffer_store(scores, scores[i] / total, [i])
        best, choice = _local("best", 1), _local("choice", 1, "int32")

        def value_left(i: int, _: Any) -> Any:
            return T.if_then_else(left[i] == 1, values[i], T.float32(-inf))

        def place_of_best(i: int, expert: Any) -> Any:
            is_best = tirx.all(left[i] == 1, values[i] == best[0])
            return T.if_then_else(is_best, T.Cast("float32", expert), T.float32(E - 1))

        def score_of_choice(i: int, expert: Any) -> Any:
            return T.if_then_else(expert == choice[0], scores[i], T.float32(0))

        for j in range(top_k):
            T.buffer_store(best, over_lanes(-inf, value_left, T.max), [0])
            # The first of the largest; where there is none, for a NaN, the last expert.
            T.buffer_store(choice, T.Cast("int32", over_lanes(E - 1, place_of_best, T.min)), [0])
            T.buffer_store(chosen, over_lanes(0, score_of_choice, add), [j])
            for i in range(own):
                T.buffer_store(left, T.if_then_else(i * WAVE + lane == choice[0], T.int32(0), left[i]), [i])
            with T.If(tirx.all(lane == 0, token < tokens)), T.Then():
                T.buffer_store(flat["experts"], choice[0], [token * top_k + j])
        with T.If(tirx.all(lane == 0, token < tokens)), T.Then():
            sum_of = reduce(add, [chosen[j] for j in range(top_k)]) if normalise else T.float32(1)
            for j in range(top_k):
                T.buffer_store(flat["scores"], chosen[j] / sum_of, [token * top_k + j])


def _sort(flat: Any, slots: Any, E: int) -> None:
    """The launch that sorts: where the entries of each expert go, and where they end."""
    with (
        T.thread_binding(T.if_then_else(slots > 0, T.int64(E), T.int64(0)), thread="blockIdx.x") as block,
        T.thread_binding(MOST_THREADS, thread="threadIdx.x") as thread,
    ):
        expert = T.Bind(T.Cast("int32", block))
        shared = IRBuilder.name("shared", T.alloc_buffer((2 * WAVES,), "float32", scope="shared"))
        before, until, place = _local("before", 1), _local("until", 1), _local("place", 1, "int32")
        loaded = _local("loaded", TOGETHER, "int32")
        groups = T.Bind(T.ceildiv(slots, T.int64(MOST_THREADS * TOGETHER)))
        first = T.Bind(thread * groups * TOGETHER)

        def each(entry: Callable[[Any, Any], None]) -> None:
            """Each entry of the thread's stretch, and its expert; E where there is none."""
            with T.serial(groups) as group:
                for i in range(TOGETHER):
                    slot = first + group * TOGETHER + i
                    value = flat["experts"][T.min(slot, slots - 1)]
                    T.buffer_store(loaded, T.if_then_else(slot < slots, value, T.int32(E)), [i])
                for i in range(TOGETHER):
                    entry(first + group * TOGETHER + i, loaded[i])

        def count(_: Any, value: Any) -> None:
            T.buffer_store(before, before[0] + T.Cast("float32", value < expert), [0])
            T.buffer_store(until, until[0] + T.Cast("float32", value == expert), [0])

        # Whole numbers below 2 ** 24 are exact in float32.
        T.buffer_store(before, T.float32(0), [0])
        T.buffer_store(until, T.float32(0), [0])
        each(count)
        T.buffer_store(place, T.Cast("int32", T.float32(0) - until[0]), [0])
        block_reduce(before, shared, thread, MOST_THREADS)
        wave_scan(until, thread)
        with T.If(thread % WAVE == WAVE - 1), T.Then():
            T.buffer_store(shared, until[0], [WAVES + thread // WAVE])
        sums = [shared[WAVES + wave] for wave in range(WAVES)]
        lower = [T.if_then_else(wave < thread // WAVE, sums[wave], T.float32(0)) for wave in range(WAVES)]
        T.buffer_store(place, place[0] + T.Cast("int32", before[0] + reduce(add, lower) + until[0]), [0])
        end = _local("end", 1, "int32")
        T.buffer_store(end, T.Cast("int32", before[0] + reduce(add, sums)), [0])

        def put(slot: Any, value: Any) -> None:
            with T.If(value == expert), T.Then():
                T.buffer_store(flat["order"], T.Cast("int32", slot), [place[0]])
                T.buffer_store(flat["ends"], end[0], [place[0]])
                T.buffer_store(place, place[0] + 1, [0])

        each(put)


@dataclass(frozen=True)
class Route(KernelFamily):
    """`route` by the softmax of bf16 or float32 logits of up to 1,024 experts.

    Entries are counted in float32, so that a batch may have 2 ** 24 (T * k) at most; that is not checked.
    """

    name: str = "rocm.route"
    op: str = "route"

    def serves(self, spec: OpSpec, target: RocmTarget) -> bool:
        logits = spec.input("logits")
        known = logits.dtype in ("bfloat16", "float32") and not spec.has_input("bias")
        return known and spec.attribute("top_k") <= logits.size(1) <= MOST_EXPERTS

    def launches(self, spec: OpSpec, config: Config, tokens: int, target: RocmTarget) -> int:
        return 2

    def build(self, spec: OpSpec, config: Config, target: RocmTarget) -> tirx.PrimFunc:
        logits = spec.input("logits")
        return route(logits.size(1), spec.attribute("top_k"), bool(spec.attribute("normalise")), logits.dtype)
