"""Writes k and v into the paged KV cache, for models whose rotary embedding is not fused with it.

Bytes per token, for `size` bytes a value: 2 * KH * (D + DV) * size (every value read once and written once); no
arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import DTYPE_BYTES, OpSpec
from vllm_compile.targets import Target

from ..family import Config, KernelFamily, Variant
from .rope_cache import PARALLEL_TOKENS


def kv_cache_write(kv_heads: int, dims: Sequence[int], dtype: str, lanes: int, parallel: bool) -> tirx.PrimFunc:
    """k [T, KH, D], v [T, KH, DV], kv [B, KH, N, D + DV] in place, slot_mapping [T]; or k alone, of D columns.

    `dims` holds D and DV, or D alone.
    """
    loop = T.parallel if parallel else T.serial
    align = DTYPE_BYTES[dtype]

    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        rows = [T.arg(name, T.handle()) for name, _ in zip("kv", dims, strict=False)]
        kv, slot_mapping = (T.arg(name, T.handle()) for name in ("kv_cache", "slot_mapping"))
        tokens, blocks, block_size = T.int64(), T.int64(), T.int64()
        strides = [T.int64(), T.int64(), T.int64(), 1]
        rows_THD = [
            T.match_buffer(row, (tokens, kv_heads, dim), dtype, align=align)
            for row, dim in zip(rows, dims, strict=True)
        ]
        kv_BHNC = T.match_buffer(kv, (blocks, kv_heads, block_size, sum(dims)), dtype, strides=strides, align=align)
        slot_T = T.match_buffer(slot_mapping, (tokens,), "int64", align=8)
        with loop(0, tokens) as t:
            slot = T.Bind(slot_T[t])
            with build.If(slot >= T.int64(0)), build.Then():
                block = T.Bind(T.truncdiv(slot, block_size))
                offset = T.Bind(slot - block * block_size)
                for i, (row_THD, dim) in enumerate(zip(rows_THD, dims, strict=True)):
                    chunk = math.gcd(dim, 2 * lanes)
                    with T.serial(0, kv_heads) as h, T.serial(0, dim // chunk) as c, T.vectorized(0, chunk) as j:
                        d = c * chunk + j
                        T.buffer_store(kv_BHNC, row_THD[t, h, d], [block, h, offset, sum(dims[:i]) + d])
    return builder.get()


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
        dims = [spec.input(name).size(2) for name in ("k", "v") if spec.has_input(name)]
        return kv_cache_write(k.size(1), dims, k.dtype, target.vector_lanes, config["parallel"])
