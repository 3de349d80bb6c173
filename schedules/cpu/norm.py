"""RMSNorm, alone and after a residual add: row by row, twice over each, the second time from the L1 cache.

Bytes per row of D values of `size` bytes: 2 * D * size (read x, write the result), with the residual
4 * D * size; some 4 floating-point operations per value.  One row of 2,048 bf16 values is 4 KiB
and takes a fraction of a microsecond, less than waking the other cores does: few rows run serially.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from ..family import Config, KernelFamily, Variant
from .rounding import rounded

# A row of 2,048 bf16 values takes 0.2 microseconds, waking OpenMP's threads 2 to 5: from here two cores gain.
PARALLEL_ROWS = 32


def pairwise_sum(values: tirx.Buffer, count: int) -> tirx.Expr:
    """values[0] + ... + values[count - 1], added as a balanced tree: short chains, small error."""
    terms = [values[i] for i in range(count)]
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


def _row_kernel(width: int, dtype: str, eps: float, lanes: int):
    """normalise(x_TD, weight_D, out_TD, t): row t of `rms_norm`, rounded to `dtype` as the reference does."""
    # Four registers' worth of partial sums hide the latency of an addition; no remainder for any width.
    chunk = math.gcd(width, 4 * lanes)

    @T.inline
    def normalise(x_TD, weight_D, out_TD, t):
        squares = T.alloc_buffer((chunk,), "float32")
        for j in T.vectorized(chunk):
            squares[j] = T.float32(0)
        for i in T.serial(width // chunk):
            for j in T.vectorized(chunk):
                squares[j] += T.Cast("float32", x_TD[t, i * chunk + j]) * T.Cast("float32", x_TD[t, i * chunk + j])
        mean: T.let[T.float32] = pairwise_sum(squares, chunk) / T.float32(width)
        inverse: T.let[T.float32] = T.float32(1) / T.sqrt(mean + T.float32(eps))
        for i in T.serial(width // chunk):
            for j in T.vectorized(chunk):
                out_TD[t, i * chunk + j] = T.Cast(
                    dtype,
                    T.Cast("float32", weight_D[i * chunk + j])
                    * rounded(T.Cast("float32", x_TD[t, i * chunk + j]) * inverse, dtype),
                )

    return normalise, chunk


def rms_norm(width: int, dtype: str, eps: float, lanes: int, parallel: bool) -> tirx.PrimFunc:
    """x [T, D], weight [D] -> [T, D]."""
    normalise, _ = _row_kernel(width, dtype, eps, lanes)
    rows = T.parallel if parallel else T.serial
    align = 4 if dtype == "float32" else 2

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, weight: T.handle, out: T.handle):
        tokens = T.int64()
        x_TD = T.match_buffer(x, (tokens, width), dtype, align=align)
        weight_D = T.match_buffer(weight, (width,), dtype, align=align)
        out_TD = T.match_buffer(out, (tokens, width), dtype, align=align)
        for t in rows(tokens):
            normalise(x_TD, weight_D, out_TD, t)

    return kernel


def add_rms_norm(width: int, dtype: str, eps: float, lanes: int, parallel: bool) -> tirx.PrimFunc:
    """x, residual [T, D], weight [D] -> residual + x, its RMSNorm, both [T, D]."""
    normalise, chunk = _row_kernel(width, dtype, eps, lanes)
    rows = T.parallel if parallel else T.serial
    align = 4 if dtype == "float32" else 2

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, residual: T.handle, weight: T.handle, total: T.handle, out: T.handle):
        tokens = T.int64()
        x_TD = T.match_buffer(x, (tokens, width), dtype, align=align)
        residual_TD = T.match_buffer(residual, (tokens, width), dtype, align=align)
        weight_D = T.match_buffer(weight, (width,), dtype, align=align)
        total_TD = T.match_buffer(total, (tokens, width), dtype, align=align)
        out_TD = T.match_buffer(out, (tokens, width), dtype, align=align)
        for t in rows(tokens):
            for i in T.serial(width // chunk):
                for j in T.vectorized(chunk):
                    total_TD[t, i * chunk + j] = T.Cast(
                        dtype,
                        T.Cast("float32", residual_TD[t, i * chunk + j]) + T.Cast("float32", x_TD[t, i * chunk + j]),
                    )
            normalise(total_TD, weight_D, out_TD, t)

    return kernel


@dataclass(frozen=True)
class RMSNorm(KernelFamily):
    """`rms_norm` for every width and dtype."""

    name: str = "cpu.rms_norm"
    op: str = "rms_norm"

    def serves(self, spec: OpSpec, target: Target) -> bool:
        return spec.op == self.op

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        return (Variant(1, {"parallel": False}), Variant(PARALLEL_ROWS, {"parallel": True}))

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        x = spec.input("x")
        build = rms_norm if self.op == "rms_norm" else add_rms_norm
        return build(x.size(-1), x.dtype, spec.attribute("eps"), target.vector_lanes, config["parallel"])


@dataclass(frozen=True)
class AddRMSNorm(RMSNorm):
    """`add_rms_norm` for every width and dtype."""

    name: str = "cpu.add_rms_norm"
    op: str = "add_rms_norm"
