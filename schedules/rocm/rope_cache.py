"""Rotary embedding and KV cache write: a thread block a token, 32 bytes a lane.

Bytes: T * (H + 2 * KH) * D * 4, read once and written once; 6 operations a rotated value.  One token of Llama-3.1-8B
is 24 KB: latency alone; 8,192 tokens are 201 MB, 38 us at an MI300X's 5.3 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import OpSpec
from vllm_compile.targets.rocm import RocmTarget

from ..family import Config, KernelFamily
from ..rounding import rounded
from .norm import ALIGN, VECTOR, threads_for


def qkv_rope_cache(heads: int, kv_heads: int, head_dim: int) -> tirx.PrimFunc:
    """qkv [T, (H+2*KH)*D], cos, sin [T, D], kv [B, KH, N, 2*D] in place, slot_mapping [T] -> q [T, H, D]."""
    half = head_dim // 2
    per_head = half // VECTOR  # a lane takes a vector of a head's first half, and that of its second
    items = (heads + 2 * kv_heads) * per_head
    threads = threads_for(items)
    k_end = heads + kv_heads

    def product(a: tirx.Expr, b: tirx.Expr) -> tirx.Expr:
        return rounded(T.Cast("float32", a) * T.Cast("float32", b), "bfloat16")

    def rotated(x_TC: tirx.Buffer, cos_TD: tirx.Buffer, sin_TD: tirx.Buffer, t, head, j, second: bool) -> tirx.Expr:
        """Value j < D/2 of a head, or D/2 + j, after rotation."""
        x, y = x_TC[t, head * head_dim + j], x_TC[t, head * head_dim + half + j]
        if second:
            return T.Cast("bfloat16", product(y, cos_TD[t, half + j]) + product(x, sin_TD[t, half + j]))
        return T.Cast("bfloat16", product(x, cos_TD[t, j]) - product(y, sin_TD[t, j]))

    @T.prim_func(s_tir=True)
    def kernel(qkv: T.handle, cos: T.handle, sin: T.handle, kv: T.handle, slot_mapping: T.handle, out: T.handle):
        tokens = T.int64()
        blocks = T.int64()
        block_size = T.int64()
        block_stride = T.int64()
        head_stride = T.int64()
        token_stride = T.int64()
        qkv_TC = T.match_buffer(qkv, (tokens, (heads + 2 * kv_heads) * head_dim), "bfloat16", align=ALIGN)
        cos_TD = T.match_buffer(cos, (tokens, head_dim), "bfloat16", align=ALIGN)
        sin_TD = T.match_buffer(sin, (tokens, head_dim), "bfloat16", align=ALIGN)
        kv_BHNC = T.match_buffer(
            kv,
            (blocks, kv_heads, block_size, 2 * head_dim),
            "bfloat16",
            strides=[block_stride, head_stride, token_stride, 1],
            align=ALIGN,
        )
        slot_T = T.match_buffer(slot_mapping, (tokens,), "int64", align=8)
        q_THD = T.match_buffer(out, (tokens, heads, head_dim), "bfloat16", align=ALIGN)
        for t in T.thread_binding(tokens, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                slot: T.let[T.int64] = slot_T[t]
                block: T.let[T.int64] = T.truncdiv(slot, block_size)
                offset: T.let[T.int64] = slot - block * block_size
                for i in T.serial(-(-items // threads)):
                    if i * threads + thread < items:
                        head: T.let[T.int32] = (i * threads + thread) // per_head
                        at: T.let[T.int32] = (i * threads + thread) % per_head * VECTOR
                        if head < heads:
                            for j in T.vectorized(VECTOR):
                                q_THD[t, head, at + j] = rotated(qkv_TC, cos_TD, sin_TD, t, head, at + j, False)
                            for j in T.vectorized(VECTOR):
                                q_THD[t, head, half + at + j] = rotated(qkv_TC, cos_TD, sin_TD, t, head, at + j, True)
                        elif slot >= T.int64(0):
                            if head < k_end:
                                for j in T.vectorized(VECTOR):
                                    kv_BHNC[block, head - heads, offset, at + j] = rotated(
                                        qkv_TC, cos_TD, sin_TD, t, head, at + j, False
                                    )
                                for j in T.vectorized(VECTOR):
                                    kv_BHNC[block, head - heads, offset, half + at + j] = rotated(
                                        qkv_TC, cos_TD, sin_TD, t, head, at + j, True
                                    )
                            else:
                                for j in T.vectorized(VECTOR):
                                    kv_BHNC[block, head - k_end, offset, head_dim + at + j] = qkv_TC[
                                        t, head * head_dim + at + j
                                    ]
                                for j in T.vectorized(VECTOR):
                                    kv_BHNC[block, head - k_end, offset, head_dim + half + at + j] = qkv_TC[
                                        t, head * head_dim + half + at + j
                                    ]

    return kernel


@dataclass(frozen=True)
class QKVRopeCache(KernelFamily):
    """`qkv_rope_cache` of bf16 heads whose size is a multiple of 16."""

    name: str = "rocm.qkv_rope_cache"
    op: str = "qkv_rope_cache"

    def serves(self, spec: OpSpec, target: RocmTarget) -> bool:
        return spec.input("qkv").dtype == "bfloat16" and spec.attribute("head_dim") % (2 * VECTOR) == 0

    def build(self, spec: OpSpec, config: Config, target: RocmTarget) -> tirx.PrimFunc:
        return qkv_rope_cache(*(spec.attribute(name) for name in ("num_heads", "num_kv_heads", "head_dim")))
