"""Checkpoints whose tensors are not the model's parameters: of a mixture of experts they hold each expert's alone.

What belongs to what is known to transformers: its loader's own rules are applied here, one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from vllm_compile.errors import ModelError

from .checkpoint import Checkpoint, DummyCheckpoint


class ConvertedCheckpoint(Checkpoint):
    """A checkpoint by the names of the model's parameters, which `conversions` make from its tensors.

    Tensors that only have another name are found under both.
    """

    def __init__(self, directory: Path, conversions: Sequence[WeightTransform]) -> None:
        super().__init__(directory)
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._renamed: dict[str, str] = {}
        self._parts: dict[str, dict[str, list[str]]] = {}  # parameter -> pattern -> tensors
        for name in sorted(super().names(), key=dot_natural_key):
            parameter, pattern = rename_source_key(name, renamings, self._converters)
            if pattern is None:
                self._renamed[parameter] = name
            else:
                self._parts.setdefault(parameter, {}).setdefault(pattern, []).append(name)

    def __contains__(self, name: str) -> bool:
        return name in self._parts or name in self._renamed or super().__contains__(name)

    def names(self) -> list[str]:
        """Names of all parameters."""
        return [*self._renamed, *self._parts]

    def read(self, name: str) -> torch.Tensor:
        """The parameter called `name`, in the dtype it was stored in."""
        if name not in self._parts:
            return super().read(self._renamed.get(name, name))
        read = super().read
        return self._convert(name, {p: [read(n) for n in names] for p, names in self._parts[name].items()})

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the parameter called `name`; no tensor is read."""
        if name not in self._parts:
            return super().shape(self._renamed.get(name, name))
        shape = super().shape
        parts = {
            pattern: [torch.empty(shape(n), device="meta") for n in names]
            for pattern, names in self._parts[name].items()
        }
        return tuple(self._convert(name, parts).shape)

    def _convert(self, name: str, tensors: dict[str, list[torch.Tensor]]) -> torch.Tensor:
        converter = next(c for c in self._converters if set(tensors) <= set(c.source_patterns))
        patterns = {"source_patterns": converter.source_patterns, "target_patterns": converter.target_patterns}
        parts: dict = tensors  # lists of tensors at first, at last one tensor
        try:
            for operation in converter.operations:
                parts = operation.convert(parts, **patterns)
            (tensor,) = parts.values()
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{self.directory}: the tensors of {name} do not fit together ({reason})") from error
        return tensor


def weight_conversions(model: PreTrainedModel) -> tuple[WeightTransform, ...]:
    """The rules by which transformers makes the model's parameters from a checkpoint's tensors, if it has any."""
    return tuple(get_model_conversion_mapping(model, add_legacy=False))


def open_checkpoint(
    directory: Path,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    dummy_seed: int | None,
    conversions: Sequence[WeightTransform] = (),
) -> Checkpoint | DummyCheckpoint:
    """The checkpoint in `directory`, or random weights of these shapes from a seed."""
    if dummy_seed is not None:
        return DummyCheckpoint(shapes, dtype, dummy_seed)
    return ConvertedCheckpoint(directory, conversions) if conversions else Checkpoint(directory)
