"""Row lookup, and the gate of an MLP on its own: each byte read once and written once, 16 a lane.

`embedding`: T * D * 4 bytes.  `silu_mul` (behind a matrix product that is no kernel of ours): T * I * 6 bytes; 8,192
tokens of Llama-3.1-8B are 705 MB, 133 us at an MI300X's 5.3 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import e, log2

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import DTYPE_BYTES, OpSpec
from vllm_compile.targets.rocm import RocmTarget

from ..family import Config, KernelFamily
from ..rounding import rounded
from .intrinsics import reciprocal
from .norm import ALIGN, VECTOR, threads_for


def silu(gate: tirx.Expr) -> tirx.Expr:
    """silu of a float32 value, rounded to bf16."""
    return rounded(gate * reciprocal(T.float32(1) + T.exp2(gate * T.float32(-log2(e)))), "bfloat16")


def embedding(rows: int, width: int, ids_dtype: str) -> tirx.PrimFunc:
    """ids [T], table [V, D] -> its rows [T, D]; a block copies one."""
    vectors = width // VECTOR
    threads = threads_for(vectors)

    @T.prim_func(s_tir=True)
    def kernel(ids: T.handle, table: T.handle, out: T.handle):
        tokens = T.int64()
        ids_T = T.match_buffer(ids, (tokens,), ids_dtype, align=DTYPE_BYTES[ids_dtype])
        table_VD = T.match_buffer(table, (rows, width), "bfloat16", align=ALIGN)
        out_TD = T.match_buffer(out, (tokens, width), "bfloat16", align=ALIGN)
        for t in T.thread_binding(tokens, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                row: T.let[T.int64] = T.Cast("int64", ids_T[t])
                for i in T.serial(-(-vectors // threads)):
                    if i * threads + thread < vectors:
                        for j in T.vectorized(VECTOR):
                            out_TD[t, (i * threads + thread) * VECTOR + j] = table_VD[
                                row, (i * threads + thread) * VECTOR + j
                            ]

    return kernel


def silu_mul(width: int) -> tirx.PrimFunc:
    """x [T, 2 * I], gates then ups -> silu(gate) * up [T, I]; silu is rounded before it multiplies."""
    vectors = width // VECTOR
    threads = threads_for(vectors)

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, out: T.handle):
        tokens = T.int64()
        x_TC = T.match_buffer(x, (tokens, 2 * width), "bfloat16", align=ALIGN)
        out_TI = T.match_buffer(out, (tokens, width), "bfloat16", align=ALIGN)
        for t in T.thread_binding(tokens, thread="blockIdx.x"):
            for part in T.thread_binding(-(-vectors // threads), thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    gate = T.alloc_buffer((VECTOR,), "float32", scope="local")
                    up = T.alloc_buffer((VECTOR,), "float32", scope="local")
                    if part * threads + thread < vectors:
                        for j in T.vectorized(VECTOR):
                            gate[j] = T.Cast("float32", x_TC[t, (part * threads + thread) * VECTOR + j])
                        for j in T.vectorized(VECTOR):
                            up[j] = T.Cast("float32", x_TC[t, width + (part * threads + thread) * VECTOR + j])
                        for j in T.unroll(VECTOR):
                            up[j] = silu(gate[j]) * up[j]
                        for j in T.vectorized(VECTOR):
                            out_TI[t, (part * threads + thread) * VECTOR + j] = T.Cast("bfloat16", up[j])

    return kernel


@dataclass(frozen=True)
class Embedding(KernelFamily):
    """`embedding` of bf16 rows whose width is a multiple of 8."""

    name: str = "rocm.embedding"
    op: str = "embedding"

    def serves(self, spec: OpSpec, target: RocmTarget) -> bool:
        table = spec.input("table")
        return table.dtype == "bfloat16" and table.size(1) % VECTOR == 0

    def build(self, spec: OpSpec, config: Config, target: RocmTarget) -> tirx.PrimFunc:
        table = spec.input("table")
        return embedding(table.size(0), table.size(1), spec.input("ids").dtype)


@dataclass(frozen=True)
class SiluMul(KernelFamily):
    """`silu_mul` of bf16 rows whose half is a multiple of 8."""

    name: str = "rocm.silu_mul"
    op: str = "silu_mul"

    def serves(self, spec: OpSpec, target: RocmTarget) -> bool:
        return spec.input("x").dtype == "bfloat16" and spec.outputs[0].size(1) % VECTOR == 0

    def build(self, spec: OpSpec, config: Config, target: RocmTarget) -> tirx.PrimFunc:
        return silu_mul(spec.outputs[0].size(1))
