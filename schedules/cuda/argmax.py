"""The most probable token of each row of logits: a thread block a row, read once.

Bytes: T * V * 2.  A row of 128,256 logits, which lm_head has just left in L2, is 257 KB: 2.3 us at the 64 bytes a cycle
that a multiprocessor reads there (1.755 GHz).  256 rows are 66 MB, 14 us at 4.8 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily
from .launch import Launch, kernel
from .norm import WEIGHTS, threads_for

SHARED_BYTES = 32 * 8  # of each warp a value and where it is


@dataclass(frozen=True)
class Argmax(KernelFamily):
    """`argmax` of bf16 or float32 rows."""

    name: str = "cuda.argmax"
    op: str = "argmax"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        return spec.input("logits").dtype in WEIGHTS

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        logits = spec.input("logits")
        threads = threads_for(logits.size(1))
        return kernel(
            spec,
            "argmax.cuh",
            f"argmax<{logits.size(1)}, {threads}, {WEIGHTS[logits.dtype]}>",
            lambda call: Launch([call.dims[Sym.TOKENS]], threads, SHARED_BYTES),
            lambda call: [call.data("logits"), call.data("out")],
        )
