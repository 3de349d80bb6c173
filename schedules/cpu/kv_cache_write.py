"""Writes k and v into the paged KV cache, for models whose rotary embedding is not fused with it.

Bytes per token, for `size` bytes a value: 4 * KH * D * size (every value read once and written once); no arithmetic.
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
from .rope_cache import PARALLEL_TOKENS


def kv_cache_write(kv_heads: int, head_dim: int, dtype: str, lanes: int, parallel: bool) -> tirx.PrimFunc:
    """k, v [T, KH, D], kv [B, KH, N, 2*D] in place, slot_mapping [T]."""
    chunk = math.gcd(head_dim, 2 * lanes)
    loop = T.parallel if parallel else T.serial
    align = DTYPE_BYTES[dtype]

    @T.prim_func(s_tir=True)
    def kernel(k: T.handle, v: T.handle, kv: T.handle, slot_mapping: T.handle):
        tokens = T.int64()
        blocks = T.int64()
        block_size = T.int64()
        block_stride = T.int64()
        head_stride = T.int64()
        token_stride = T.int64()
        k_THD = T.match_buffer(k, (tokens, kv_heads, head_dim), dtype, align=align)
        v_THD = T.match_buffer(v, (tokens, kv_heads, head_dim), dtype, align=align)
        kv_BHNC = T.match_buffer(
            kv,
            (blocks, kv_heads, block_size, 2 * head_dim),
            dtype,
            strides=[block_stride, head_stride, token_stride, 1],
            align=align,
        )
        slot_T = T.match_buffer(slot_mapping, (tokens,), "int64", align=8)
        for t in loop(tokens):
            slot: T.let[T.int64] = slot_T[t]
            if slot >= T.int64(0):
                block: T.let[T.int64] = T.truncdiv(slot, block_size)
                offset: T.let[T.int64] = slot - block * block_size
                for h, i in T.grid(kv_heads, head_dim // chunk):
                    for j in T.vectorized(chunk):
                        kv_BHNC[block, h, offset, i * chunk + j] = k_THD[t, h, i * chunk + j]
                for h, i in T.grid(kv_heads, head_dim // chunk):
                    for j in T.vectorized(chunk):
                        kv_BHNC[block, h, offset, head_dim + i * chunk + j] = v_THD[t, h, i * chunk + j]

    return kernel


@dataclass(frozen=True)
class KVCacheWrite(KernelFamily):
    """`kv_cache_write` for every head size and dtype."""

    name: str = "cpu.kv_cache_write"
    op: str = "kv_cache_write"

    def serves(self, spec: OpSpec, target: Target) -> bool:
        return spec.op == self.op

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        return (Variant(1, {"parallel": False}), Variant(PARALLEL_TOKENS, {"parallel": True}))

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        k = spec.input("k")
        return kv_cache_write(k.size(1), k.size(2), k.dtype, target.vector_lanes, config["parallel"])
