"""Rotates q and k and writes k and v into the paged KV cache, in one pass over the tokens.

Bytes per token, for `size` bytes a value: 2 * (H + 2 * KH) * D * size (every value of qkv is read once and
written once) and 2 * D * size of cosines and sines; 3 floating-point operations per rotated value.
Llama-3.2-1B in bf16: 12 KiB per token, a fraction of a microsecond from the L2 cache, so that few tokens
run serially.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import DTYPE_BYTES, OpSpec
from vllm_compile.targets import Target

from ..family import Config, KernelFamily, Variant
from ..rounding import rounded

# A token of Llama-3.2-1B takes 0.3 microseconds, waking OpenMP's threads 2 to 5: from here two cores gain.
PARALLEL_TOKENS = 16


def qkv_rope_cache(heads: int, kv_heads: int, head_dim: int, dtype: str, lanes: int, parallel: bool) -> tirx.PrimFunc:
    """qkv [T, (H+2*KH)*D], cos, sin [T, D], kv [B, KH, N, 2*D] in place, slot_mapping [T] -> q [T, H, D]."""
    half = head_dim // 2
    chunk = math.gcd(half, 2 * lanes)
    loop = T.parallel if parallel else T.serial
    align = DTYPE_BYTES[dtype]
    k_start, v_start = heads * head_dim, (heads + kv_heads) * head_dim

    def product(a: tirx.Expr, b: tirx.Expr) -> tirx.Expr:
        return rounded(T.Cast("float32", a) * T.Cast("float32", b), dtype)

    def rotated_first(x_TC, cos_TD, sin_TD, t, start, j) -> tirx.Expr:
        """Value j < D/2 of the rotated head that starts at column `start`."""
        x, y = x_TC[t, start + j], x_TC[t, start + half + j]
        return T.Cast(dtype, product(x, cos_TD[t, j]) - product(y, sin_TD[t, j]))

    def rotated_second(x_TC, cos_TD, sin_TD, t, start, j) -> tirx.Expr:
        """Value D/2 + j of that head."""
        x, y = x_TC[t, start + j], x_TC[t, start + half + j]
        return T.Cast(dtype, product(y, cos_TD[t, half + j]) + product(x, sin_TD[t, half + j]))

    @T.prim_func(s_tir=True)
    def kernel(qkv: T.handle, cos: T.handle, sin: T.handle, kv: T.handle, slot_mapping: T.handle, out: T.handle):
        tokens = T.int64()
        blocks = T.int64()
        block_size = T.int64()
        block_stride = T.int64()
        head_stride = T.int64()
        token_stride = T.int64()
        qkv_TC = T.match_buffer(qkv, (tokens, (heads + 2 * kv_heads) * head_dim), dtype, align=align)
        cos_TD = T.match_buffer(cos, (tokens, head_dim), dtype, align=align)
        sin_TD = T.match_buffer(sin, (tokens, head_dim), dtype, align=align)
        kv_BHNC = T.match_buffer(
            kv,
            (blocks, kv_heads, block_size, 2 * head_dim),
            dtype,
            strides=[block_stride, head_stride, token_stride, 1],
            align=align,
        )
        slot_T = T.match_buffer(slot_mapping, (tokens,), "int64", align=8)
        q_THD = T.match_buffer(out, (tokens, heads, head_dim), dtype, align=align)
        for t in loop(tokens):
            for h, i in T.grid(heads, half // chunk):
                for j in T.vectorized(chunk):
                    q_THD[t, h, i * chunk + j] = rotated_first(qkv_TC, cos_TD, sin_TD, t, h * head_dim, i * chunk + j)
                    q_THD[t, h, half + i * chunk + j] = rotated_second(
                        qkv_TC, cos_TD, sin_TD, t, h * head_dim, i * chunk + j
                    )
            slot: T.let[T.int64] = slot_T[t]
            if slot >= T.int64(0):
                block: T.let[T.int64] = T.truncdiv(slot, block_size)
                offset: T.let[T.int64] = slot - block * block_size
                for h, i in T.grid(kv_heads, half // chunk):
                    for j in T.vectorized(chunk):
                        kv_BHNC[block, h, offset, i * chunk + j] = rotated_first(
                            qkv_TC, cos_TD, sin_TD, t, k_start + h * head_dim, i * chunk + j
                        )
                        kv_BHNC[block, h, offset, half + i * chunk + j] = rotated_second(
                            qkv_TC, cos_TD, sin_TD, t, k_start + h * head_dim, i * chunk + j
                        )
                for h, i in T.grid(kv_heads, head_dim // chunk):
                    for j in T.vectorized(chunk):
                        kv_BHNC[block, h, offset, head_dim + i * chunk + j] = qkv_TC[
                            t, v_start + h * head_dim + i * chunk + j
                        ]

    return kernel


@dataclass(frozen=True)
class QKVRopeCache(KernelFamily):
    """`qkv_rope_cache` for every even head size and dtype."""

    name: str = "cpu.qkv_rope_cache"
    op: str = "qkv_rope_cache"

    def serves(self, spec: OpSpec, target: Target) -> bool:
        return spec.op == self.op and spec.attribute("head_dim") % 2 == 0

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        return (Variant(1, {"parallel": False}), Variant(PARALLEL_TOKENS, {"parallel": True}))

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        heads, kv_heads = spec.attribute("num_heads"), spec.attribute("num_kv_heads")
        head_dim, dtype = spec.attribute("head_dim"), spec.input("qkv").dtype
        return qkv_rope_cache(heads, kv_heads, head_dim, dtype, target.vector_lanes, config["parallel"])
