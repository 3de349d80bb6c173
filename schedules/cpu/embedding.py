"""Row lookup: copies one row of a table per id, bit for bit.

Bytes per row of D values of `size` bytes: 2 * D * size; no arithmetic.  One row of 2,048 bf16 values
is 4 KiB, so one token costs one cache miss rather than bandwidth, and few tokens run serially.
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

# A row of 2,048 bf16 values takes 0.06 microseconds, waking OpenMP's threads 2 to 5: here two cores gain.
PARALLEL_ROWS = 64


def embedding(rows: int, width: int, dtype: str, ids_dtype: str, lanes: int, parallel: bool) -> tirx.PrimFunc:
    """ids [T], table [V, D] -> [T, D]."""
    chunk = math.gcd(width, 4 * lanes)
    loop = T.parallel if parallel else T.serial
    align, ids_align = DTYPE_BYTES[dtype], DTYPE_BYTES[ids_dtype]

    @T.prim_func(s_tir=True)
    def kernel(ids: T.handle, table: T.handle, out: T.handle):
        tokens = T.int64()
        ids_T = T.match_buffer(ids, (tokens,), ids_dtype, align=ids_align)
        table_VD = T.match_buffer(table, (rows, width), dtype, align=align)
        out_TD = T.match_buffer(out, (tokens, width), dtype, align=align)
        for t in loop(tokens):
            row: T.let[T.int64] = T.Cast("int64", ids_T[t])
            for i in T.serial(width // chunk):
                for j in T.vectorized(chunk):
                    out_TD[t, i * chunk + j] = table_VD[row, i * chunk + j]

    return kernel


@dataclass(frozen=True)
class Embedding(KernelFamily):
    """`embedding` for every table whose size is known, ids int32 or int64."""

    name: str = "cpu.embedding"
    op: str = "embedding"

    def serves(self, spec: OpSpec, target: Target) -> bool:
        return spec.op == self.op

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        return (Variant(1, {"parallel": False}), Variant(PARALLEL_ROWS, {"parallel": True}))

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        table = spec.input("table")
        ids_dtype = spec.input("ids").dtype
        lanes, parallel = target.vector_lanes, config["parallel"]
        return embedding(table.size(0), table.size(1), table.dtype, ids_dtype, lanes, parallel)
