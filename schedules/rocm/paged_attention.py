"""Attention over the paged KV cache on the matrix cores: a thread block a stretch of a token's cache and KV head.

Bytes: 4 * KH * D a cached token, read once for all queries of its group; 4 * H * D operations.  Llama-3.1-8B: 4,096
bytes a token and layer; 64 requests of 1,024 tokens are 268 MB, 51 us at an MI300X's 5.3 TB/s.

Waves take tiles of 16 cached tokens in turn, each with its own online softmax (Milakov and Gimelshein 2018); they meet
once, in LDS.  Scores are K @ Q.T, tokens by queries, as the next product takes them: V.T @ P needs no exchange between
lanes.  A lane's rows of V.T lie D / 16 apart, so that it reads neighbours of a token's V.

Where tokens times KV heads are fewer than compute units, each token's cache is split, as evenly as whole tiles of each
wave allow, and a second launch adds up the parts (combine.py).  Several tokens of a request (prefill) are as many
thread blocks, which read its cache from L2.
"""

from __future__ import annotations

from math import e, log2
from typing import Any

from tvm import tirx
from tvm.ir import PointerType, PrimType
from tvm.script import tirx as T

from vllm_compile.targets.rocm import WAVE

from .build import WORKSPACE, WORKSPACE_BYTES
from .combine import LOWEST, MOST_SPLITS, combiner, workspace_bytes
from .intrinsics import block_reduce, from_lane, mfma, uniform
from .norm import ALIGN, VECTOR

TILE = 16  # cached tokens, and queries, of an MFMA
LANE_STEPS = (16, 32)  # between the lanes that share a query
FLOATS = PointerType(PrimType("float32"), "global")


def paged_attention(heads: int, kv_heads: int, head_dim: int, scale: float, waves: int, blocks: int) -> tirx.PrimFunc:
    """q [T, H, D], kv [B, KH, N, 2*D], block_table [R, W], seq_lens [R], query_start_loc [R+1] -> out [T, H, D].

    A token's cache is split while there are no more than `blocks` thread blocks of so many `waves`.
    """
    group = heads // kv_heads
    threads = waves * WAVE
    vectors = head_dim // 32  # of 8 values, that a lane has of a token's K
    own = head_dim // TILE  # neighbouring values that a lane has of a token's V: a row of each of so many products
    width = min(own, VECTOR)  # of them at once
    kept = 4 * group  # lanes whose sums are of a query
    # LDS, one buffer (build.py): sums, largest scores and weights of each wave, counts of waves.
    all_largest = waves * own * kept * 4
    all_weights = all_largest + waves * TILE
    counts = all_weights + waves * TILE
    factor = scale * log2(e)
    ends = blocks * group * head_dim  # in the workspace (combine.py)
    combine = combiner(heads, kv_heads, head_dim, blocks)

    def spread(value: tirx.Expr, lane: tirx.Expr, combine: Any, into: tirx.Buffer) -> None:
        """into[0] = value combined over the four lanes of a query."""
        T.buffer_store(into, value, [0])
        for step in LANE_STEPS:
            T.buffer_store(into, combine(into[0], from_lane(into[0], T.bitwise_xor(lane, step))), [0])

    def bits(value: tirx.Expr) -> tirx.Expr:
        """A float32 that is neither infinite nor NaN, rounded to bf16 (nearest, ties to even)."""
        word = T.reinterpret("uint32", value)
        last = T.bitwise_and(T.shift_right(word, T.uint32(16)), T.uint32(1))
        return T.Cast("uint16", T.shift_right(word + last + T.uint32(0x7FFF), T.uint32(16)))

    def add(a: tirx.Expr, b: tirx.Expr) -> tirx.Expr:
        return a + b

    @T.prim_func(s_tir=True)
    def kernel(
        q: T.handle, kv: T.handle, block_table: T.handle, seq_lens: T.handle, query_start_loc: T.handle, out: T.handle
    ):
        tokens = T.int64()
        cache_blocks = T.int64()
        block_size = T.int64()
        requests = T.int64()
        boundaries = T.int64()
        table_width = T.int64()
        block_stride = T.int64()
        head_stride = T.int64()
        token_stride = T.int64()
        q_THD = T.match_buffer(q, (tokens, heads, head_dim), "bfloat16", align=ALIGN)
        kv_BHNC = T.match_buffer(
            kv,
            (cache_blocks, kv_heads, block_size, 2 * head_dim),
            "bfloat16",
            strides=[block_stride, head_stride, token_stride, 1],
            align=ALIGN,
        )
        table_RW = T.match_buffer(block_table, (requests, table_width), "int32", align=4)
        seq_R = T.match_buffer(seq_lens, (requests,), "int32", align=4)
        start_R1 = T.match_buffer(query_start_loc, (boundaries,), "int32", align=4)
        out_THD = T.match_buffer(out, (tokens, heads, head_dim), "bfloat16", align=ALIGN)
        q_bits = T.decl_buffer((tokens * heads * head_dim,), "uint16", data=q_THD.data, align=ALIGN)
        kv_bits = T.decl_buffer((cache_blocks * block_stride,), "uint16", data=kv_BHNC.data, align=ALIGN)
        parts: T.let[T.handle("float32", "global")] = T.call_extern(FLOATS, WORKSPACE)
        workspace = T.decl_buffer((blocks * group * (head_dim + 2),), "float32", data=parts, align=ALIGN)
        fitting: T.let[T.int64] = T.truncdiv(T.int64(blocks), T.max(tokens, T.int64(1)) * kv_heads)
        splits: T.let[T.int64] = T.max(T.min(fitting, T.int64(MOST_SPLITS)), T.int64(1))
        for head in T.thread_binding(kv_heads, thread="blockIdx.x"):
            for t in T.thread_binding(tokens, thread="blockIdx.y"):
                for split in T.thread_binding(splits, thread="blockIdx.z"):
                    for thread in T.thread_binding(threads, thread="threadIdx.x"):
                        count = T.alloc_buffer((1,), "float32", scope="local")
                        query = T.alloc_buffer((vectors * VECTOR,), "uint16", scope="local")
                        key = T.alloc_buffer((vectors * VECTOR,), "uint16", scope="local")
                        value = T.alloc_buffer((4 * own,), "uint16", scope="local")
                        column = T.alloc_buffer((4,), "uint16", scope="local")
                        p = T.alloc_buffer((4,), "uint16", scope="local")
                        scores = T.alloc_buffer((4,), "float32", scope="local")
                        sums = T.alloc_buffer((own * 4,), "float32", scope="local")
                        most = T.alloc_buffer((1,), "float32", scope="local")
                        largest = T.alloc_buffer((1,), "float32", scope="local")
                        weight = T.alloc_buffer((1,), "float32", scope="local")
                        result = T.alloc_buffer((own,), "float32", scope="local")
                        shared = T.alloc_buffer((counts + waves,), "float32", scope="shared")
                        wave: T.let[T.int32] = uniform(thread // WAVE)
                        lane: T.let[T.int32] = thread % WAVE
                        at: T.let[T.int32] = thread % TILE  # the lane's token of a tile of K, and its query
                        quarter: T.let[T.int32] = lane // TILE

                        # The token's request is the last that starts at or before it.
                        count[0] = T.float32(0)
                        for i in T.serial(T.ceildiv(requests, T.int64(threads))):
                            if i * threads + thread < requests:  # noqa: SIM102 (what is read must be there)
                                if T.Cast("int64", start_R1[i * threads + thread]) <= t:
                                    count[0] += T.float32(1)
                        block_reduce(count, shared, thread, threads, at=counts)
                        request: T.let[T.int32] = T.max(uniform(T.Cast("int32", count[0])) - 1, 0)
                        end: T.let[T.int32] = start_R1[request + 1]
                        length: T.let[T.int32] = seq_R[request]
                        visible: T.let[T.int32] = T.if_then_else(
                            tirx.all(t < T.Cast("int64", end), length > 0), length - end + 1 + T.Cast("int32", t), 0
                        )
                        tiles: T.let[T.int32] = (visible + TILE - 1) // TILE
                        # The block's stretch of them: as many for each of its waves.
                        stretches: T.let[T.int32] = T.Cast("int32", splits) * waves
                        share: T.let[T.int32] = T.truncdiv(tiles + stretches - 1, stretches) * waves
                        begin: T.let[T.int32] = uniform(T.min(T.Cast("int32", split) * share, tiles))
                        own_tiles: T.let[T.int32] = uniform(T.min(share, tiles - begin))

                        for v in T.unroll(vectors):
                            for j in T.vectorized(VECTOR):
                                query[v * VECTOR + j] = q_bits[
                                    (t * heads + head * group + T.min(at, group - 1)) * head_dim
                                    + v * 32
                                    + quarter * VECTOR
                                    + j
                                ]
                        for m in T.unroll(own):
                            for i in T.vectorized(4):
                                sums[m * 4 + i] = T.float32(0)
                        largest[0] = T.float32(LOWEST)
                        weight[0] = T.float32(0)
                        for turn in T.serial((own_tiles + waves - 1) // waves):
                            tile: T.let[T.int32] = begin + turn * waves + wave
                            first: T.let[T.int32] = T.min(tile, tiles - 1) * TILE
                            block: T.let[T.int64] = T.Cast(
                                "int64", table_RW[request, T.truncdiv(T.Cast("int64", first), block_size)]
                            )
                            base: T.let[T.int64] = (
                                block * block_stride
                                + head * head_stride
                                + T.truncmod(T.Cast("int64", first), block_size) * token_stride
                            )
                            for v in T.unroll(vectors):
                                for j in T.vectorized(VECTOR):
                                    key[v * VECTOR + j] = kv_bits[
                                        base + at * token_stride + v * 32 + quarter * VECTOR + j
                                    ]
                            for i in T.unroll(4):
                                row_base: T.let[T.int64] = base + (quarter * 4 + i) * token_stride + head_dim + at * own
                                for v in T.unroll(own // width):
                                    for j in T.vectorized(width):
                                        value[i * own + v * width + j] = T.if_then_else(
                                            first + quarter * 4 + i < visible,
                                            kv_bits[row_base + v * width + j],
                                            T.uint16(0),
                                        )
                            for i in T.vectorized(4):
                                scores[i] = T.float32(0)
                            for i in T.unroll(2 * vectors):
                                scores[T.ramp(0, 1, 4)] = mfma(
                                    key.vload([i * 4], "uint16x4"),
                                    query.vload([i * 4], "uint16x4"),
                                    scores.vload([0], "float32x4"),
                                )
                            for i in T.unroll(4):
                                scores[i] = T.if_then_else(
                                    tile * TILE + quarter * 4 + i < visible,
                                    scores[i] * T.float32(factor),
                                    T.float32(LOWEST),
                                )
                            spread(T.max(T.max(scores[0], scores[1]), T.max(scores[2], scores[3])), lane, T.max, most)
                            most[0] = T.max(most[0], largest[0])
                            weight[0] = weight[0] * T.exp2(largest[0] - most[0])
                            for i in T.unroll(own * 4):
                                sums[i] = sums[i] * T.exp2(largest[0] - most[0])
                            largest[0] = most[0]
                            for i in T.unroll(4):
                                scores[i] = T.exp2(scores[i] - most[0])
                                weight[0] += scores[i]
                                p[i] = bits(scores[i])
                            for m in T.unroll(own):
                                for i in T.unroll(4):
                                    column[i] = value[i * own + m]
                                sums[T.ramp(m * 4, 1, 4)] = mfma(
                                    column.vload([0], "uint16x4"),
                                    p.vload([0], "uint16x4"),
                                    sums.vload([m * 4], "float32x4"),
                                )

                        spread(weight[0], lane, add, weight)
                        mine: T.let[T.int32] = quarter * group + T.min(at, group - 1)  # of a wave's sums that are kept
                        if at < group:
                            for m in T.unroll(own):
                                for i in T.vectorized(4):
                                    shared[((wave * own + m) * kept + mine) * 4 + i] = sums[m * 4 + i]
                        if lane < TILE:
                            shared[all_largest + wave * TILE + at] = largest[0]
                            shared[all_weights + wave * TILE + at] = weight[0]
                        most[0] = T.float32(LOWEST)
                        for w in T.unroll(waves):
                            most[0] = T.max(most[0], shared[all_largest + w * TILE + at])
                        weight[0] = T.float32(0)
                        for w in T.unroll(waves):
                            weight[0] += shared[all_weights + w * TILE + at] * T.exp2(
                                shared[all_largest + w * TILE + at] - most[0]
                            )
                        for turn in T.serial(4 // waves):
                            row: T.let[T.int32] = turn * waves + wave
                            for m in T.unroll(own):
                                result[m] = T.float32(0)
                            for w in T.unroll(waves):
                                for m in T.unroll(own):
                                    result[m] += shared[((w * own + m) * kept + mine) * 4 + row] * T.exp2(
                                        shared[all_largest + w * TILE + at] - most[0]
                                    )
                            if tirx.all(at < group, visible > 0, splits == 1):
                                for v in T.unroll(own // width):
                                    for j in T.vectorized(width):
                                        out_THD[t, head * group + at, (quarter * 4 + row) * own + v * width + j] = (
                                            T.Cast("bfloat16", result[v * width + j] / weight[0])
                                        )
                            if tirx.all(at < group, splits > 1):
                                part: T.let[T.int64] = (t * kv_heads + head) * splits + split
                                for v in T.unroll(own // 4):
                                    for j in T.vectorized(4):
                                        workspace[
                                            (part * group + at) * head_dim + (quarter * 4 + row) * own + v * 4 + j
                                        ] = result[v * 4 + j]
                                if quarter * 4 + row == 0:
                                    workspace[ends + part * (2 * group) + at] = most[0]
                                    workspace[ends + part * (2 * group) + group + at] = weight[0]
        combine(workspace, out_THD, tokens, splits)

    return kernel.with_attr(WORKSPACE_BYTES, workspace_bytes(blocks, group, head_dim))
