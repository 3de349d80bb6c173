"""The gated half of an MLP: silu(gate) * up, both products in registers, so that neither goes to memory.

The panels of gate and up alternate, so that a tile holds the same columns of both.
Bytes: 2 * I * K * size of weights, T * (K + I) * size of activations; 4 * T * I * K operations, T * I exponentials.
Llama-3.2-1B (K = 2048, I = 8192, bf16): 64 MiB, 1.7 ms at 40 GB/s.
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
from ..vector_math import exp
from .matmul import Value, matmul
from .matmul_design import matmul_design
from .matmul_tiles import admits, default_variants, serves, space
from .matmul_weights import weight_layout


def finish(tensors: dict[str, tirx.Buffer], totals: list[tirx.Buffer], row: tirx.Expr, column: tirx.Expr) -> Value:
    """silu(gate) * up with the reference's roundings: of gate, of up, of silu, of the product."""
    gate, up = totals
    lanes, dtype = gate.shape[0], tensors["out"].dtype
    with T.vectorized(0, lanes) as j:
        T.buffer_store(gate, rounded(gate[j], dtype), [j])
    g = T.Bind(gate.vload([0], f"float32x{lanes}"))
    silu = g / (T.broadcast(T.float32(1), lanes) + exp(T.broadcast(T.float32(0), lanes) - g))
    T.buffer_store(gate, silu, [T.ramp(0, 1, lanes)])
    return lambda j: rounded(gate[j], dtype) * rounded(up[j], dtype)


def activation(tensors: dict[str, tirx.Buffer], totals: list[tirx.Buffer], row: tirx.Expr, column: tirx.Expr) -> Value:
    """The first half of `finish`, value by value: silu of the rounded gate."""

    def value(j: tirx.Expr) -> tirx.Expr:
        rounded_gate = rounded(totals[0][j], tensors["out"].dtype)
        gate = tirx.Var("gate", rounded_gate.ty)
        return tirx.Let(gate, rounded_gate, gate / (T.float32(1) + exp(T.float32(0) - gate)))

    return value


def times_up(tensors: dict[str, tirx.Buffer], totals: list[tirx.Buffer], row: tirx.Expr, column: tirx.Expr) -> Value:
    """The second half."""
    dtype = tensors["out"].dtype
    return lambda j: rounded(totals[0][j], dtype) * rounded(totals[1][j], dtype)


@dataclass(frozen=True)
class GateUpSilu(KernelFamily):
    """`gate_up_silu` with float32 or bfloat16 weights of every shape, or lossless ones in whole panels."""

    packed: bool
    op: str = "gate_up_silu"

    @property
    def name(self) -> str:
        return "cpu.gate_up_silu_lossless" if self.packed else "cpu.gate_up_silu"

    def serves(self, spec: OpSpec, target: Target) -> bool:
        return spec.op == self.op and serves(spec, target, True, self.packed)

    def layouts(self, spec: OpSpec, target: Target) -> Mapping[str, Layout]:
        return {"weight": weight_layout(spec, target, True, self.packed)}

    def space(self, spec: OpSpec, target: Target) -> Sequence[Config]:
        """Every tile that fits the registers."""
        return space(spec, target, True, self.packed)

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        return default_variants(spec, target, True, self.packed)

    def admits(self, spec: OpSpec, config: Config, min_tokens: int, target: Target) -> bool:
        return admits(spec, config, min_tokens, target, True, self.packed)

    def design(self, spec: OpSpec, tokens: int, target: Target) -> Design | None:
        """Plain weights alone, as of linear layers."""
        return None if self.packed else matmul_design(spec, tokens, target, times_up, activation)

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        if TRACE in config:
            return traced(self.design(spec, config[TOKENS], target), config)
        return matmul(spec, config, target, True, finish)
