"""Row lookup, and the gate of an MLP on its own: each byte read once and written once.

`embedding`: T * D * 4 bytes.  `silu_mul` (behind a matrix product that is no kernel of ours): T * I * 6 bytes; 8,192
tokens of Llama-3.1-8B are 705 MB, 147 us at 4.8 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from vllm_compile.spec import DTYPE_BYTES, OpSpec, Sym, TensorSpec
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily
from .launch import VECTOR_BYTES, Launch, kernel
from .norm import VECTOR, threads_for

IDS = {"int32": "int32_t", "int64": "int64_t"}
GATE_THREADS = 256


@dataclass(frozen=True)
class Embedding(KernelFamily):
    """`embedding` of rows of 16 * n bytes, bf16 or float32."""

    name: str = "cuda.embedding"
    op: str = "embedding"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        table = spec.input("table")
        return table.dtype in ("bfloat16", "float32") and _row_bytes(table) % VECTOR_BYTES == 0

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        vectors = _row_bytes(spec.input("table")) // VECTOR_BYTES
        threads = threads_for(vectors * VECTOR)
        return kernel(
            spec,
            "elementwise.cuh",
            f"embedding<{vectors}, {threads}, {IDS[spec.input('ids').dtype]}>",
            lambda call: Launch([call.dims[Sym.TOKENS]], threads),
            lambda call: [call.data("ids"), call.data("table"), call.data("out")],
        )


def _row_bytes(table: TensorSpec) -> int:
    return table.size(1) * DTYPE_BYTES[table.dtype]


@dataclass(frozen=True)
class SiluMul(KernelFamily):
    """`silu_mul` of bf16 rows whose half is a multiple of 8."""

    name: str = "cuda.silu_mul"
    op: str = "silu_mul"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        return spec.input("x").dtype == "bfloat16" and spec.outputs[0].size(1) % VECTOR == 0

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        width = spec.outputs[0].size(1)
        blocks = -(-width // VECTOR // GATE_THREADS)
        return kernel(
            spec,
            "elementwise.cuh",
            f"silu_mul<{width}, {GATE_THREADS}>",
            lambda call: Launch([call.dims[Sym.TOKENS] * blocks], GATE_THREADS),
            lambda call: [call.data("x"), call.data("out")],
        )
