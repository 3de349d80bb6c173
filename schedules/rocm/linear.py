"""Linear layers, and the gated half of an MLP, for few tokens: families around matmul.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx

from vllm_compile.lossless import Lossless
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets.rocm import RocmTarget

from ..family import Config, KernelFamily, Variant, Vendor
from ..layouts import Layout
from . import matmul
from .footprint import Footprint


class _Product(KernelFamily):
    """A product with bf16 weights as PyTorch has them, or lossless where the model of the chip has that faster."""

    packed: bool
    gated: bool

    @property
    def name(self) -> str:
        return f"rocm.{self.op}{'_lossless' if self.packed else ''}"

    def serves(self, spec: OpSpec, target: RocmTarget) -> bool:
        served = spec.op == self.op and matmul.serves(spec, self.gated, self.packed)
        return served and (not self.packed or matmul.pays(spec, target, self.gated))

    def layouts(self, spec: OpSpec, target: RocmTarget) -> Mapping[str, Layout]:
        return {"weight": Lossless()} if self.packed else {}

    def variants(self, spec: OpSpec, target: RocmTarget) -> Sequence[Variant]:
        return matmul.variants(spec, target, self.gated, self.packed)

    def space(self, spec: OpSpec, target: RocmTarget) -> Sequence[Config]:
        return matmul.space(spec, target, self.gated, self.packed)

    def admits(self, spec: OpSpec, config: Config, min_tokens: int, target: RocmTarget) -> bool:
        return matmul.admits(spec, config, min_tokens, target, self.gated, self.packed)

    def footprint(self, spec: OpSpec, config: Config, tokens: int, target: RocmTarget) -> Footprint:
        return matmul.footprint(spec, config, tokens, self.gated, self.packed)

    def build(self, spec: OpSpec, config: Config, target: RocmTarget) -> tirx.PrimFunc:
        return matmul.matmul(spec, config, self.gated, self.packed)


@dataclass(frozen=True)
class Linear(_Product):
    """`linear` with bf16 weights [4 * a, 64 * b] ([32 * a, 64 * b] lossless); bias and residual in the epilogue."""

    packed: bool = False
    op: str = "linear"
    gated: bool = False

    def vendor(self, spec: OpSpec, target: RocmTarget) -> Vendor:
        return Vendor("linear", matmul.vendor_tokens(self.packed))


@dataclass(frozen=True)
class GateUpSilu(_Product):
    """`gate_up_silu` with bf16 weights [2 * 16 * a, 64 * b]; a thread block has the gates and ups of its rows."""

    packed: bool = False
    op: str = "gate_up_silu"
    gated: bool = True

    def vendor(self, spec: OpSpec, target: RocmTarget) -> Vendor:
        both = TensorSpec((Sym.TOKENS, spec.input("weight").size(0)), "bfloat16")
        return Vendor(
            "linear", matmul.vendor_tokens(self.packed), epilogue=OpSpec("silu_mul", (("x", both),), spec.outputs)
        )
