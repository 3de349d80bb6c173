"""Linear layers, and the gated half of an MLP, for few tokens: families around matmul.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets.rocm import RocmTarget

from ..family import Config, KernelFamily, Variant, Vendor
from . import matmul
from .footprint import Footprint


@dataclass(frozen=True)
class Linear(KernelFamily):
    """`linear` with bf16 weights [16 * a, 64 * b] as PyTorch has them; bias and residual in the epilogue."""

    name: str = "rocm.linear"
    op: str = "linear"

    def serves(self, spec: OpSpec, target: RocmTarget) -> bool:
        return spec.op == self.op and matmul.serves(spec, gated=False)

    def variants(self, spec: OpSpec, target: RocmTarget) -> Sequence[Variant]:
        return matmul.variants(spec, target, gated=False)

    def space(self, spec: OpSpec, target: RocmTarget) -> Sequence[Config]:
        return matmul.space(spec, target, gated=False)

    def admits(self, spec: OpSpec, config: Config, min_tokens: int, target: RocmTarget) -> bool:
        return matmul.admits(spec, config, min_tokens, target, gated=False)

    def footprint(self, spec: OpSpec, config: Config, tokens: int, target: RocmTarget) -> Footprint:
        return matmul.footprint(spec, config, tokens, gated=False)

    def vendor(self, spec: OpSpec, target: RocmTarget) -> Vendor:
        return Vendor("linear", matmul.VENDOR_TOKENS)

    def build(self, spec: OpSpec, config: Config, target: RocmTarget) -> tirx.PrimFunc:
        return matmul.matmul(spec, config, gated=False)


@dataclass(frozen=True)
class GateUpSilu(KernelFamily):
    """`gate_up_silu` with bf16 weights [2 * 16 * a, 64 * b]; a thread block has the gates and ups of its rows."""

    name: str = "rocm.gate_up_silu"
    op: str = "gate_up_silu"

    def serves(self, spec: OpSpec, target: RocmTarget) -> bool:
        return spec.op == self.op and matmul.serves(spec, gated=True)

    def variants(self, spec: OpSpec, target: RocmTarget) -> Sequence[Variant]:
        return matmul.variants(spec, target, gated=True)

    def space(self, spec: OpSpec, target: RocmTarget) -> Sequence[Config]:
        return matmul.space(spec, target, gated=True)

    def admits(self, spec: OpSpec, config: Config, min_tokens: int, target: RocmTarget) -> bool:
        return matmul.admits(spec, config, min_tokens, target, gated=True)

    def footprint(self, spec: OpSpec, config: Config, tokens: int, target: RocmTarget) -> Footprint:
        return matmul.footprint(spec, config, tokens, gated=True)

    def vendor(self, spec: OpSpec, target: RocmTarget) -> Vendor:
        both = TensorSpec((Sym.TOKENS, spec.input("weight").size(0)), "bfloat16")
        return Vendor("linear", matmul.VENDOR_TOKENS, epilogue=OpSpec("silu_mul", (("x", both),), spec.outputs))

    def build(self, spec: OpSpec, config: Config, target: RocmTarget) -> tirx.PrimFunc:
        return matmul.matmul(spec, config, gated=True)
