"""Linear layers, with bias and residual added while the sums are at hand.

Bytes: N * K * size of weights, T * (K + N) * size of activations, T * N * size of residual; 2 * T * N * K
operations.  Llama-3.2-1B's down projection (2048 x 8192, bf16): 32 MiB, 0.8 ms at 40 GB/s for any T up to 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from ..design import TOKENS, TRACE, Design, traced
from ..family import Config, KernelFamily, Variant
from ..layouts import Layout
from ..rounding import rounded
from .matmul import Value, matmul
from .matmul_design import matmul_design
from .matmul_tiles import admits, default_variants, serves, space
from .matmul_weights import weight_layout


def finish(tensors: dict[str, tirx.Buffer], totals: list[tirx.Buffer], row: tirx.Expr, column: tirx.Expr) -> Value:
    """Bias in float32, rounding, residual: as the reference does."""

    def value(j: tirx.Expr) -> tirx.Expr:
        y = totals[0][j]
        if "bias" in tensors:
            y = y + T.Cast("float32", tensors["bias"][column + j])
        if "residual" in tensors:
            y = T.Cast("float32", tensors["residual"][row, column + j]) + rounded(y, tensors["out"].dtype)
        return y

    return value


@dataclass(frozen=True)
class Linear(KernelFamily):
    """`linear` with float32 or bfloat16 weights of every shape, or lossless ones in whole panels."""

    packed: bool
    op: str = "linear"

    @property
    def name(self) -> str:
        return "cpu.linear_lossless" if self.packed else "cpu.linear"

    def serves(self, spec: OpSpec, target: Target) -> bool:
        return spec.op == self.op and serves(spec, target, False, self.packed)

    def layouts(self, spec: OpSpec, target: Target) -> Mapping[str, Layout]:
        return {"weight": weight_layout(spec, target, False, self.packed)}

    def space(self, spec: OpSpec, target: Target) -> Sequence[Config]:
        """Every tile that fits the registers."""
        return space(spec, target, False, self.packed)

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        return default_variants(spec, target, False, self.packed)

    def admits(self, spec: OpSpec, config: Config, min_tokens: int, target: Target) -> bool:
        return admits(spec, config, min_tokens, target, False, self.packed)

    def design(self, spec: OpSpec, tokens: int, target: Target) -> Design | None:
        """Plain weights alone: TIR has no words for the side list of lossless ones."""
        return None if self.packed else matmul_design(spec, tokens, target, finish)

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        if TRACE in config:
            return traced(self.design(spec, config[TOKENS], target), config)
        return matmul(spec, config, target, False, finish)
