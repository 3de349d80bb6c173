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

from vllm_compile.spec import DTYPE_BYTES, OpSpec
from vllm_compile.targets import Target

from ..family import Config, KernelFamily, Variant
from ..rounding import rounded

# A row of 2,048 bf16 values takes 0.2 microseconds, waking OpenMP's threads 2 to 5: from here two cores gain.
PARALLEL_ROWS = 32


def pairwise_sum(values: tirx.Buffer, count: int) -> tirx.Expr:
    """values[0] + ... + values[count - 1], added as a balanced tree: short chains, small error."""
    terms = [values[i] for i in range(count)]
    while len(terms) > 1:
        pairs = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


def _row_kernel(width: int, dtype: str, weight_dtype: str, eps: float, lanes: int):
    """normalise(x_TD, weight_D, out_TD, t): row t of `rms_norm`, rounded as the reference does."""
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
                    * rounded(T.Cast("float32", x_TD[t, i * chunk + j]) * inverse, weight_dtype),
                )

    return normalise, chunk


def rms_norm(
    heads: int, width: int, dtype: str, weight_dtype: str, eps: float, lanes: int, parallel: bool
) -> tirx.PrimFunc:
    """x [T, D] or [T, H, D], weight [D] -> the same shape; each row of D values by itself."""
    normalise, _ = _row_kernel(width, dtype, weight_dtype, eps, lanes)
    rows = T.parallel if parallel else T.serial
    align, weight_align = DTYPE_BYTES[dtype], DTYPE_BYTES[weight_dtype]
    lead = (heads,) if heads else ()
    per_token = heads or 1

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, weight: T.handle, out: T.handle):
        tokens = T.int64()
        x_in = T.match_buffer(x, (tokens, *lead, width), dtype, align=align)
        weight_D = T.match_buffer(weight, (width,), weight_dtype, align=weight_align)
        out_in = T.match_buffer(out, (tokens, *lead, width), dtype, align=align)
        x_RD = T.decl_buffer((tokens * per_token, width), dtype, data=x_in.data, align=align)
        out_RD = T.decl_buffer((tokens * per_token, width), dtype, data=out_in.data, align=align)
        for r in rows(tokens * per_token):
            normalise(x_RD, weight_D, out_RD, r)

    return kernel


def add_rms_norm(width: int, dtype: str, weight_dtype: str, eps: float, lanes: int, parallel: bool) -> tirx.PrimFunc:
    """x, residual [T, D], weight [D] -> residual + x, its RMSNorm, both [T, D]."""
    normalise, chunk = _row_kernel(width, dtype, weight_dtype, eps, lanes)
    rows = T.parallel if parallel else T.serial
    align, weight_align = DTYPE_BYTES[dtype], DTYPE_BYTES[weight_dtype]

    @T.prim_func(s_tir=True)
    def kernel(x: T.handle, residual: T.handle, weight: T.handle, total: T.handle, out: T.handle):
        tokens = T.int64()
        x_TD = T.match_buffer(x, (tokens, width), dtype, align=align)
        residual_TD = T.match_buffer(residual, (tokens, width), dtype, align=align)
        weight_D = T.match_buffer(weight, (width,), weight_dtype, align=weight_align)
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
        ranks = (2, 3) if self.op == "rms_norm" else (2,)
        return spec.op == self.op and len(spec.input("x").shape) in ranks

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        return (Variant(1, {"parallel": False}), Variant(PARALLEL_ROWS, {"parallel": True}))

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        x, weight = spec.input("x"), spec.input("weight").dtype
        rest = (x.size(-1), x.dtype, weight, spec.attribute("eps"), target.vector_lanes, config["parallel"])
        if self.op == "add_rms_norm":
            return add_rms_norm(*rest)
        return rms_norm(x.size(1) if len(x.shape) == 3 else 0, *rest)


@dataclass(frozen=True)
class AddRMSNorm(RMSNorm):
    """`add_rms_norm` for every width and dtype."""

    name: str = "cpu.add_rms_norm"
    op: str = "add_rms_norm"
