"""Which kernels serve a call: the first family in its target's table that can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_compile.errors import UnsupportedError
from vllm_compile.lossless import Lossless
from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from .cpu import FAMILIES as CPU_FAMILIES
from .cuda import FAMILIES as CUDA_FAMILIES
from .family import KernelFamily, Variant, Vendor
from .layouts import Layout

FAMILIES: Mapping[str, Sequence[KernelFamily]] = {"cpu": CPU_FAMILIES, "cuda": CUDA_FAMILIES}


@dataclass(frozen=True)
class Choice:
    """A family for one call, with all that follows from it."""

    family: KernelFamily
    layouts: Mapping[str, Layout]
    variants: Sequence[Variant]
    vendor: Vendor | None = None


def choose(spec: OpSpec, target: Target, lossless: bool = True) -> Choice:
    """The kernels for `spec` on `target`; `lossless` admits those that read losslessly packed weights.

    Raises:
        UnsupportedError: none of the target's families serves the call; it is named.
    """
    for family in FAMILIES[target.name]:
        if family.op != spec.op or not spec.options <= family.options or not family.serves(spec, target):
            continue
        layouts = family.layouts(spec, target)
        if lossless or not any(isinstance(layout, Lossless) for layout in layouts.values()):
            return Choice(family, layouts, family.variants(spec, target), family.vendor(spec, target))
    inputs = ", ".join(f"{name} {list(map(str, tensor.shape))} {tensor.dtype}" for name, tensor in spec.inputs)
    options = "".join(f", {name}={spec.attribute(name)}" for name in sorted(spec.options))
    raise UnsupportedError(f"target {target.name} has no kernel for {spec.op}({inputs}{options})")
