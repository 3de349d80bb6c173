"""Bytes of a model's weights: as they are, and as an artifact stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from vllm_compile.relax_passes.outline_layers import FORWARD, LOGITS
from vllm_compile.spec import TensorSpec

from .graph import Call, numbered_calls
from .kernels import Chooser

POSITION_TABLE = "position_table"  # what the importer calls them


@dataclass(frozen=True)
class Weights:
    """Bytes of all weights plain, as they are stored, and of plain copies that a library reads beside those."""

    parameters: int
    plain: int
    stored: int
    copies: int


def count_weights(fused: Sequence[Call], chooser: Chooser) -> Weights:
    """A weight that several calls read (a tied embedding) is stored once for each layout.

    Tables of functions of the position are stored like weights, but are no parameters.
    """
    plain: dict[Any, int] = {}
    stored: dict[Any, int] = {}
    copies: dict[Any, int] = {}
    parameters: dict[Any, int] = {}
    for number, call in numbered_calls(fused):
        choice = chooser.choice(call.spec)
        for name, label in call.weights.items():
            tensor = call.spec.input(name)
            shape = tuple(tensor.size(axis) for axis in range(len(tensor.shape)))
            # Within a layer each call has weights of its own; outside, their names tell which are tied.
            outside = call.function in {FORWARD, LOGITS}
            key = (label, shape) if outside else (call.function, number, name)
            plain[key] = tensor.nbytes() * call.times
            if not all(part.startswith(POSITION_TABLE) for part in label.split(" + ")):
                parameters[key] = prod(shape) * call.times
            layout = choice.layouts.get(name) if choice is not None else None
            if choice is None or layout is None:
                stored[key, None] = plain[key]
                continue
            packed = TensorSpec(layout.shape(shape), layout.dtype(tensor.dtype))
            stored[key, layout.name] = packed.nbytes() * call.times
            if choice.vendor is not None:
                copies[key] = plain[key]
    extra = sum(size for key, size in copies.items() if (key, None) not in stored)
    return Weights(sum(parameters.values()), sum(plain.values()), sum(stored.values()), extra)
