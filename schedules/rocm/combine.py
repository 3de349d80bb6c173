"""Parts of an attention that was split along the cache, added up: a thread block a token and query head.

A part is a stretch of a token's cache, as one thread block saw it: of each query head the sums of values, unscaled,
their largest score and the sum of their exponentials ("flash decoding", Dao et al. 2023).  Parts stand in the library's
workspace (`runtime/hip.c`) from one launch to the next of the same stream.

Bytes: 4 * D + 8 a part and query head, written and read once, from L2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.targets.rocm import MOST_THREADS, WAVE

from .intrinsics import block_reduce

LOWEST = -3e38  # a score that is none: finite, so that differences are numbers
MOST_SPLITS = MOST_THREADS  # parts of a token: a thread looks at the largest score of each
LANES = 4  # values that a lane adds up
TOGETHER = 4  # parts whose values a lane requests together


def workspace_bytes(parts: int, group: int, head_dim: int) -> int:
    """Of so many parts of `group` query heads each: values, then {largest score, sum of exponentials}."""
    return 4 * parts * group * (head_dim + 2)


def combine_rounds(splits: int, head_dim: int) -> int:
    """Rounds of loads that a wave of `combine` waits for: what tells parts apart, then their values."""
    slices = MOST_THREADS // (head_dim // LANES)
    return 1 + -(-splits // (slices * TOGETHER))


def combiner(heads: int, kv_heads: int, head_dim: int, most_parts: int) -> Callable[..., Any]:
    """combine(workspace, out_THD, tokens, splits): a launch that writes each token's result, if it is split.

    The workspace: values float32 [most_parts, group, D], then largest score and sum [most_parts, 2, group].  Split s of
    a token and KV head is part (token * KH + KV head) * splits + s.
    A token none of whose parts saw anything is not written.
    """
    group = heads // kv_heads
    lanes = head_dim // LANES  # threads that a part's values keep busy
    slices = MOST_THREADS // lanes  # parts at a time
    ends = most_parts * group * head_dim
    # LDS, one buffer (build.py): largest scores of waves, sums of waves, factors of parts, totals of threads.
    waves = MOST_THREADS // WAVE
    factors = 2 * waves
    totals = factors + MOST_SPLITS

    @T.inline
    def combine(workspace, out_THD, tokens, splits):
        for head in T.thread_binding(heads, thread="blockIdx.x"):
            for t in T.thread_binding(T.if_then_else(splits > 1, tokens, T.int64(0)), thread="blockIdx.y"):
                for thread in T.thread_binding(MOST_THREADS, thread="threadIdx.x"):
                    own = T.alloc_buffer((1,), "float32", scope="local")
                    most = T.alloc_buffer((1,), "float32", scope="local")
                    weight = T.alloc_buffer((1,), "float32", scope="local")
                    loaded = T.alloc_buffer((TOGETHER * LANES,), "float32", scope="local")
                    total = T.alloc_buffer((LANES,), "float32", scope="local")
                    shared = T.alloc_buffer((totals + MOST_THREADS * LANES,), "float32", scope="shared")
                    parts: T.let[T.int32] = T.Cast("int32", splits)
                    first: T.let[T.int64] = (t * kv_heads + head // group) * splits
                    at: T.let[T.int32] = head % group
                    slice: T.let[T.int32] = thread // lanes
                    column: T.let[T.int32] = thread % lanes * LANES
                    mine: T.let[T.int64] = ends + (first + T.min(thread, parts - 1)) * (2 * group) + at
                    own[0] = T.if_then_else(thread < parts, workspace[mine], T.float32(LOWEST))
                    weight[0] = T.if_then_else(thread < parts, workspace[mine + group], T.float32(0))
                    most[0] = own[0]
                    block_reduce(most, shared, thread, MOST_THREADS, T.max)
                    own[0] = T.exp2(own[0] - most[0])
                    shared[factors + thread] = own[0]
                    weight[0] = weight[0] * own[0]
                    block_reduce(weight, shared, thread, MOST_THREADS, at=waves)
                    for j in T.vectorized(LANES):
                        total[j] = T.float32(0)
                    for turn in T.serial(T.truncdiv(parts + slices * TOGETHER - 1, slices * TOGETHER)):
                        for i in T.unroll(TOGETHER):
                            part: T.let[T.int64] = first + T.min((turn * TOGETHER + i) * slices + slice, parts - 1)
                            for j in T.vectorized(LANES):
                                loaded[i * LANES + j] = workspace[(part * group + at) * head_dim + column + j]
                        for i in T.unroll(TOGETHER):
                            for j in T.vectorized(LANES):  # of parts that there are not the factor is zero
                                total[j] += (
                                    shared[factors + (turn * TOGETHER + i) * slices + slice] * loaded[i * LANES + j]
                                )
                    for j in T.vectorized(LANES):
                        shared[totals + thread * LANES + j] = total[j]
                    if tirx.all(thread < lanes, weight[0] > T.float32(0)):
                        for s in T.unroll(1, slices):
                            for j in T.vectorized(LANES):
                                total[j] += shared[totals + s * head_dim + column + j]
                        for j in T.vectorized(LANES):
                            out_THD[t, head, column + j] = T.Cast("bfloat16", total[j] / weight[0])

    return combine
