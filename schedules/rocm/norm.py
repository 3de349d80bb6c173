"""RMSNorm, and RMSNorm of a residual sum: a thread block a row, which stays in registers between its two passes.

Bytes: T * D * 4 (8 with the sum), and D * 2 of weights; 4 * T * D operations.  One row of 4,096 values is 8 KiB: a
few microseconds of latency, whatever the bandwidth; 8,192 such rows are 134 MB, 25 us at an MI300X's 5.3 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import OpSpec
from vllm_compile.targets.rocm import MOST_THREADS, WAVE, RocmTarget

from ..family import Config, KernelFamily
from ..rounding import rounded
from .intrinsics import block_reduce

VECTOR = 8  # bf16 values that a lane reads at once: 16 bytes
ALIGN = 16
MOST_PER_THREAD = 8  # vectors of a row that a lane keeps in registers, 8 of them each


def threads_for(vectors: int, most: int = MOST_THREADS) -> int:
    """Threads of a block for so many vectors: one each, up to `most`, in whole waves."""
    return min(max(-(-vectors // WAVE) * WAVE, WAVE), most)


def _row_kernel(width: int, eps: float, add: bool) -> Any:
    """normalise(x_TD, residual_TD, weight_D, total_TD, out_TD, t, thread), row t by a block; and its threads.

    Without `add`, neither residual_TD nor total_TD is touched.
    """
    vectors = width // VECTOR
    threads = threads_for(vectors)
    own = -(-vectors // threads)
    whole = vectors == own * threads

    @T.inline
    def normalise(x_TD, residual_TD, weight_D, total_TD, out_TD, t, thread):
        values = T.alloc_buffer((own, VECTOR), "float32", scope="local")
        scale = T.alloc_buffer((own, VECTOR), "float32", scope="local")
        squares = T.alloc_buffer((1,), "float32", scope="local")
        shared = T.alloc_buffer((threads // WAVE,), "float32", scope="shared")
        squares[0] = T.float32(0)
        for i in T.unroll(own):
            if whole or i * threads + thread < vectors:
                for j in T.vectorized(VECTOR):
                    values[i, j] = T.Cast("float32", x_TD[t, (i * threads + thread) * VECTOR + j])
                for j in T.vectorized(VECTOR):  # before the barrier, which loads do not pass
                    scale[i, j] = T.Cast("float32", weight_D[(i * threads + thread) * VECTOR + j])
                if add:
                    for j in T.vectorized(VECTOR):
                        values[i, j] = rounded(
                            T.Cast("float32", residual_TD[t, (i * threads + thread) * VECTOR + j]) + values[i, j],
                            "bfloat16",
                        )
                    for j in T.vectorized(VECTOR):
                        total_TD[t, (i * threads + thread) * VECTOR + j] = T.Cast("bfloat16", values[i, j])
                for j in T.unroll(VECTOR):
                    squares[0] += values[i, j] * values[i, j]
        block_reduce(squares, shared, thread, threads)
        inverse: T.let[T.float32] = T.float32(1) / T.sqrt(squares[0] / T.float32(width) + T.float32(eps))
        for i in T.unroll(own):
            if whole or i * threads + thread < vectors:
                for j in T.vectorized(VECTOR):
                    out_TD[t, (i * threads + thread) * VECTOR + j] = T.Cast(
                        "bfloat16", scale[i, j] * rounded(values[i, j] * inverse, "bfloat16")
                    )

    return normalise, threads


def rms_norm(width: int, eps: float) -> tirx.PrimFunc:
    """x [T, D], weight [D] -> its RMSNorm [T, D]."""
    normalise, threads = _row_kernel(width, eps, add=False)

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, weight: T.handle, out: T.handle):
        tokens = T.int64()
        x_TD = T.match_buffer(x, (tokens, width), "bfloat16", align=ALIGN)
        weight_D = T.match_buffer(weight, (width,), "bfloat16", align=ALIGN)
        out_TD = T.match_buffer(out, (tokens, width), "bfloat16", align=ALIGN)
        for t in T.thread_binding(tokens, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                normalise(x_TD, x_TD, weight_D, out_TD, out_TD, t, thread)

    return kernel


def add_rms_norm(width: int, eps: float) -> tirx.PrimFunc:
    """x, residual [T, D], weight [D] -> residual + x, its RMSNorm, both [T, D]."""
    normalise, threads = _row_kernel(width, eps, add=True)

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, residual: T.handle, weight: T.handle, total: T.handle, out: T.handle):
        tokens = T.int64()
        x_TD = T.match_buffer(x, (tokens, width), "bfloat16", align=ALIGN)
        residual_TD = T.match_buffer(residual, (tokens, width), "bfloat16", align=ALIGN)
        weight_D = T.match_buffer(weight, (width,), "bfloat16", align=ALIGN)
        total_TD = T.match_buffer(total, (tokens, width), "bfloat16", align=ALIGN)
        out_TD = T.match_buffer(out, (tokens, width), "bfloat16", align=ALIGN)
        for t in T.thread_binding(tokens, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                normalise(x_TD, residual_TD, weight_D, total_TD, out_TD, t, thread)

    return kernel


@dataclass(frozen=True)
class RMSNorm(KernelFamily):
    """`rms_norm` (or `add_rms_norm`) of bf16 rows of up to 16,384 values, a multiple of 8."""

    add: bool = False

    @property
    def op(self) -> str:
        return "add_rms_norm" if self.add else "rms_norm"

    @property
    def name(self) -> str:
        return f"rocm.{self.op}"

    def serves(self, spec: OpSpec, target: RocmTarget) -> bool:
        x = spec.input("x")
        if len(x.shape) != 2 or spec.input("weight").dtype != x.dtype:
            return False
        most = VECTOR * MOST_THREADS * MOST_PER_THREAD
        return x.dtype == "bfloat16" and x.size(1) % VECTOR == 0 and x.size(1) <= most

    def build(self, spec: OpSpec, config: Config, target: RocmTarget) -> tirx.PrimFunc:
        make = add_rms_norm if self.add else rms_norm
        return make(spec.input("x").size(1), spec.attribute("eps"))
