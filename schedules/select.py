"""Which kernels serve a call: the first family in its target's table that can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from vllm_compile.errors import UnsupportedError
from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from .cpu import FAMILIES as CPU_FAMILIES
from .cuda import FAMILIES as CUDA_FAMILIES
from .design import SPACE, TOKENS, TRACE
from .family import Config, KernelFamily, TorchCall, Tuned, Variant, Vendor
from .gaudi import FAMILIES as GAUDI_FAMILIES
from .layouts import Layout
from .rocm import FAMILIES as ROCM_FAMILIES

FAMILIES: Mapping[str, Sequence[KernelFamily]] = {
    "cpu": CPU_FAMILIES,
    "cuda": CUDA_FAMILIES,
    "rocm": ROCM_FAMILIES,
    "gaudi2": GAUDI_FAMILIES,
    "gaudi3": GAUDI_FAMILIES,
}


@dataclass(frozen=True)
class Choice:
    """A family for one call, with all that follows from it."""

    family: KernelFamily
    layouts: Mapping[str, Layout]
    variants: Sequence[Variant]
    vendor: Vendor | None = None
    calls: Sequence[TorchCall] = ()  # functions of torch, where those compute the call


def operators(target: Target) -> frozenset[str]:
    """Those that the target has kernels for."""
    return frozenset(family.op for family in FAMILIES[target.name])


def choose(spec: OpSpec, target: Target, lossless: bool = True, tuned: Tuned | None = None) -> Choice:
    """The kernels for `spec` on `target`; `lossless` admits those that read losslessly packed weights.

    What `tuned` knows comes before the family's own choice, for each of the ranges of tokens that the family has.

    Raises:
        UnsupportedError: none of the target's families serves the call; it is named.
    """
    for family in FAMILIES[target.name]:
        if family.op != spec.op or not spec.options <= family.options or not family.serves(spec, target):
            continue
        layouts = family.layouts(spec, target)
        if lossless or not any(layout.lossless for layout in layouts.values()):
            variants, vendor = family.variants(spec, target), family.vendor(spec, target)
            if tuned is not None:
                variants = _tuned_variants(tuned, family, spec, target, layouts, variants, vendor)
            return Choice(family, layouts, variants, vendor, family.torch_calls(spec))
    inputs = ", ".join(f"{name} {list(map(str, tensor.shape))} {tensor.dtype}" for name, tensor in spec.inputs)
    options = "".join(f", {name}={spec.attribute(name)}" for name in sorted(spec.options))
    raise UnsupportedError(f"target {target.name} has no kernel for {spec.op}({inputs}{options})")


def token_ranges(variants: Sequence[Variant], vendor: Vendor | None) -> list[tuple[int, int | None]]:
    """The least and most tokens of each variant's calls; None where there is no most."""
    after = vendor.min_tokens if vendor is not None and not vendor.prefill else None
    ends = [*(variant.min_tokens for variant in variants[1:]), after]
    return [(v.min_tokens, None if end is None else end - 1) for v, end in zip(variants, ends, strict=True)]


def _tuned_variants(
    tuned: Tuned,
    family: KernelFamily,
    spec: OpSpec,
    target: Target,
    layouts: Mapping[str, Layout],
    variants: Sequence[Variant],
    vendor: Vendor | None,
) -> Sequence[Variant]:
    """The variants, those replaced for which there is a tuned one that the family can build here."""
    return [
        tuned.find(family, spec, layouts, tokens, default, partial(problem, family, spec, tokens, target))
        for default, tokens in zip(variants, token_ranges(variants, vendor), strict=True)
    ]


def problem(family: KernelFamily, spec: OpSpec, tokens: tuple[int, int | None], target: Target, config: Config) -> str:
    """Why the family cannot serve this range of tokens by the configuration; empty if it can."""
    unknown = "this version makes no such kernel for this call here"
    if TRACE not in config:
        return "" if family.admits(spec, config, tokens[0], target) else unknown
    design = family.design(spec, tokens[0], target) if tokens == (config.get(TOKENS),) * 2 else None
    if design is None:
        return unknown
    if config.get(SPACE) != design.space:
        return "the space of schedules that it is of has changed since"
    return "" if design.admits(config[TRACE]) else unknown
