"""Which kernels serve a call: the first family in its target's table that can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_compile.errors import UnsupportedError
from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from .cpu import FAMILIES as CPU_FAMILIES
from .family import KernelFamily, Variant
from .layouts import Layout

FAMILIES: Mapping[str, Sequence[KernelFamily]] = {"cpu": CPU_FAMILIES}


@dataclass(frozen=True)
class Choice:
    """A family for one call, with all that follows from it."""

    family: KernelFamily
    layouts: Mapping[str, Layout]
    variants: Sequence[Variant]


def choose(spec: OpSpec, target: Target) -> Choice:
    """The kernels for `spec` on `target`.

    Raises:
        UnsupportedError: none of the target's families serves the call; it is named.
    """
    for family in FAMILIES[target.name]:
        if family.op == spec.op and family.serves(spec, target):
            return Choice(family, family.layouts(spec, target), family.variants(spec, target))
    inputs = ", ".join(f"{name} {list(map(str, tensor.shape))} {tensor.dtype}" for name, tensor in spec.inputs)
    raise UnsupportedError(f"target {target.name} has no kernel for {spec.op}({inputs})")
