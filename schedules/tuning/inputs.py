"""What candidates are compared on: a call's inputs and its results, made where it is measured, without TVM.

A case (prepare.py) has a seed of them alone: weights of a model's size would be gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from vllm_compile.lossless import Lossless
from vllm_compile.products import REFERENCES
from vllm_compile.spec import OpSpec, Sym, TensorSpec

from ..layouts import Layout, Panels
from ..lossless_panels import LosslessPanels

LAYOUTS: Mapping[str, type[Any]] = {layout.__name__: layout for layout in (Panels, LosslessPanels, Lossless)}


def make(
    spec: OpSpec, layouts: Mapping[str, Layout], tokens: int, seed: int, where: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The inputs in order, weights laid out as kernels read them; and the operator's result, its sums in float64.

    On another device than before, or by another version of torch, a seed may give other numbers.
    """
    generator = torch.Generator(where).manual_seed(seed)
    inputs = {name: sample(tensor, tokens, generator) for name, tensor in spec.inputs}
    expected = REFERENCES[spec.op](**inputs, **dict(spec.attributes), wide=torch.float64)
    return [layouts[name].pack(t) if name in layouts else t for name, t in inputs.items()], expected


def sample(spec: TensorSpec, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Gaussian numbers; matrices of weights scaled so that sums of products stay of order one."""
    value = torch.randn(spec.sizes(tokens), generator=generator, device=generator.device)
    if is_matrix(spec):
        value *= value.shape[-1] ** -0.5
    return value.to(getattr(torch, spec.dtype))


def is_matrix(tensor: TensorSpec) -> bool:
    """True for weights of several axes: what a kernel streams."""
    return Sym.TOKENS not in tensor.shape and len(tensor.shape) > 1


def spec_of(workload: Mapping[str, Any]) -> OpSpec:
    """The call that a workload's content is of; which of its attributes are options it does not tell."""

    def tensor(shape: list[Any], dtype: str, strided: bool) -> TensorSpec:
        return TensorSpec(tuple(Sym(d) if isinstance(d, str) else d for d in shape), dtype, strided)

    attributes = tuple(sorted(workload["attributes"].items()))
    inputs = tuple((name, tensor(*rest)) for name, *rest in workload["inputs"])
    return OpSpec(workload["op"], inputs, tuple(tensor(*out) for out in workload["outputs"]), attributes)


def described(layouts: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Layouts as JSON: of each weight's the class, and its fields."""
    return {name: (type(layout).__name__, asdict(layout)) for name, layout in layouts.items()}


def layouts_of(content: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, Layout]:
    """What `described` gave."""
    return {name: LAYOUTS[kind](**fields) for name, (kind, fields) in content.items()}
