"""Linear layers for few tokens: weights streamed once through the tensor cores, bias and residual in the epilogue.

Bytes: N * K * 2 of weights (1.5 if lossless), T * (K + N) * 2 of activations (and T * N * 2 of residual); 2 * T * N * K
operations.  Llama-3.1-8B's down projection (4096 x 14336): 117 MB, 24.5 us at 4.8 TB/s; lossless 88 MB, 18.3 us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx

from vllm_compile.lossless import Lossless
from vllm_compile.spec import OpSpec
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily, Variant, Vendor
from ..layouts import Layout
from . import matmul


@dataclass(frozen=True)
class Linear(KernelFamily):
    """`linear` with bf16 weights [16 * a, 64 * b], plain (as PyTorch has them) or lossless."""

    packed: bool
    op: str = "linear"

    @property
    def name(self) -> str:
        return "cuda.linear_lossless" if self.packed else "cuda.linear"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        return spec.op == self.op and matmul.serves(spec)

    def layouts(self, spec: OpSpec, target: CudaTarget) -> Mapping[str, Layout]:
        return {"weight": Lossless()} if self.packed else {}

    def space(self, spec: OpSpec, target: CudaTarget) -> Sequence[Config]:
        """Every configuration that fits the weight and the shared memory."""
        return matmul.space(spec, target, self.packed)

    def variants(self, spec: OpSpec, target: CudaTarget) -> Sequence[Variant]:
        return matmul.default_variants(spec, target, self.packed)

    def vendor(self, spec: OpSpec, target: CudaTarget) -> Vendor:
        return Vendor("linear", matmul.vendor_tokens(self.variants(spec, target)))

    def candidates(self, spec: OpSpec, min_tokens: int, target: CudaTarget) -> Sequence[Config]:
        return matmul.promising(spec, target, self.packed, min_tokens)

    def admits(self, spec: OpSpec, config: Config, min_tokens: int, target: CudaTarget) -> bool:
        return matmul.admits(spec, config, min_tokens, target, self.packed)

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        return matmul.matmul(spec, config, target, gated=False)
