"""RMSNorm, and RMSNorm of a residual sum: a thread block a row, one read and one write of it.

Bytes: T * D * 4 (8 with the sum), and D * 2 of weights; 4 * T * D operations.  One row of 4,096 values is 8 KiB: a
few microseconds of latency, whatever the bandwidth; 8,192 such rows are 134 MB, 28 us at 4.8 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily
from .launch import Launch, kernel

VECTOR = 8  # bf16 values that a thread reads at once
MOST_PER_THREAD = 4  # vectors of a row that a thread keeps in registers
REDUCTION_BYTES = 128  # one float a warp


def threads_for(width: int) -> int:
    """Threads of a block for a row of `width` values: a vector each, up to 1,024 of them, in whole warps."""
    return min(max(-(-width // VECTOR // 32) * 32, 32), 1024)


@dataclass(frozen=True)
class RMSNorm(KernelFamily):
    """`rms_norm` (or `add_rms_norm`) of bf16 rows of up to 32,768 values, a multiple of 8."""

    add: bool = False

    @property
    def op(self) -> str:
        return "add_rms_norm" if self.add else "rms_norm"

    @property
    def name(self) -> str:
        return f"cuda.{self.op}"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        x = spec.input("x")
        if len(x.shape) != 2 or spec.input("weight").dtype != x.dtype:
            return False
        return x.dtype == "bfloat16" and x.size(1) % VECTOR == 0 and x.size(1) <= VECTOR * 1024 * MOST_PER_THREAD

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        width = spec.input("x").size(1)
        threads = threads_for(width)
        y = "out_1" if self.add else "out"
        names = ("x", "residual", "weight", "out_0" if self.add else "none", y)
        epsilon = T.float32(spec.attribute("eps"))
        return kernel(
            spec,
            "norm.cuh",
            f"rms_norm<{width}, {threads}, {str(self.add).lower()}>",
            lambda call: Launch([call.dims[Sym.TOKENS]], threads, REDUCTION_BYTES),
            lambda call: [*map(call.data, names), epsilon],
        )
