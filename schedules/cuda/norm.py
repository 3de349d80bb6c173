"""RMSNorm, RMSNorm of a residual sum, and LayerNorm: a thread block a row, one read and one write of it.

Bytes: T * D * 4 (8 with the sum), and D * 2 of weights; 4 * T * D operations.  One row of 4,096 values is 8 KiB: a
few microseconds of latency, whatever the bandwidth; 8,192 such rows are 134 MB, 28 us at 4.8 TB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily
from .launch import Launch, kernel

VECTOR = 8  # bf16 values that a thread reads at once
MOST_PER_THREAD = 4  # vectors of a row that a thread keeps in registers
REDUCTION_BYTES = 128  # one float a warp
WEIGHTS = {"bfloat16": "__nv_bfloat16", "float32": "float"}


def threads_for(width: int) -> int:
    """Threads of a block for a row of `width` values: a vector each, up to 1,024 of them, in whole warps."""
    return min(max(-(-width // VECTOR // 32) * 32, 32), 1024)


def _fits(x: TensorSpec, weights: Sequence[TensorSpec]) -> bool:
    """True for bf16 rows of up to 32,768 values, a multiple of 8, with weights of one dtype."""
    width, dtypes = x.size(-1), {weight.dtype for weight in weights}
    row = width % VECTOR == 0 and width <= VECTOR * 1024 * MOST_PER_THREAD
    return x.dtype == "bfloat16" and row and len(dtypes) <= 1 and dtypes <= WEIGHTS.keys()


def _rows(x: TensorSpec, tokens: Any) -> Any:
    """A norm's rows: of each token, or of each of its heads."""
    return tokens * prod(x.sizes()[1:-1])


@dataclass(frozen=True)
class RMSNorm(KernelFamily):
    """`rms_norm` (or `add_rms_norm`) of bf16 rows of up to 32,768 values, a multiple of 8; weights bf16 or float32."""

    add: bool = False

    @property
    def op(self) -> str:
        return "add_rms_norm" if self.add else "rms_norm"

    @property
    def name(self) -> str:
        return f"cuda.{self.op}"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        return _fits(spec.input("x"), [spec.input("weight")])

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        x = spec.input("x")
        threads = threads_for(x.size(-1))
        y = "out_1" if self.add else "out"
        names = ("x", "residual", "weight", "out_0" if self.add else "none", y)
        epsilon = T.float32(spec.attribute("eps"))
        weight = WEIGHTS[spec.input("weight").dtype]
        return kernel(
            spec,
            "norm.cuh",
            f"rms_norm<{x.size(-1)}, {threads}, {str(self.add).lower()}, {weight}>",
            lambda call: Launch([_rows(x, call.dims[Sym.TOKENS])], threads, REDUCTION_BYTES),
            lambda call: [*map(call.data, names), epsilon],
        )


@dataclass(frozen=True)
class LayerNorm(KernelFamily):
    """`layer_norm` of bf16 rows of up to 32,768 values, a multiple of 8; weight and bias of one dtype, or none."""

    name: str = "cuda.layer_norm"
    op: str = "layer_norm"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        return _fits(spec.input("x"), _weights(spec))

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        x = spec.input("x")
        threads = threads_for(x.size(-1))
        weight = next((WEIGHTS[weight.dtype] for weight in _weights(spec)), "float")
        epsilon = T.float32(spec.attribute("eps"))
        return kernel(
            spec,
            "layer_norm.cuh",
            f"layer_norm<{x.size(-1)}, {threads}, {weight}>",
            lambda call: Launch([_rows(x, call.dims[Sym.TOKENS])], threads, 2 * REDUCTION_BYTES),
            lambda call: [*map(call.data, ("x", "weight", "bias", "out")), epsilon],
        )


def _weights(spec: OpSpec) -> list[TensorSpec]:
    return [spec.input(name) for name in ("weight", "bias") if spec.has_input(name)]
