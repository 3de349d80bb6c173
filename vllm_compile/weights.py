"""Computes the stored weights from a checkpoint, one at a time.

The `weights` function of a compiled module says what each stored weight is in terms of the
checkpoint's tensors; here it is evaluated with torch, so that only the tensors of one weight
are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import tvm
from safetensors.torch import save_file
from tvm import relax

from .errors import ModelError, UnsupportedError
from .lowering import StoredWeight
from .relax_passes.base import Definitions
from .relax_passes.lift_weights import WEIGHTS

SHARD_BYTES = 1 << 30

OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "relax.concat": lambda call, tensors: torch.cat(list(tensors), dim=int(call.attrs.axis)),
    "relax.permute_dims": lambda call, tensor: tensor.permute([int(axis) for axis in call.attrs.axes]),
    "relax.add": lambda call, a, b: a + b,
    "relax.multiply": lambda call, a, b: a * b,
    "relax.astype": lambda call, tensor: tensor.to(getattr(torch, str(call.attrs.dtype))),
}


class WeightProgram:
    """Evaluates the fields of a module's `weights` function by name.

    `read(name)` gives the tensor of a parameter of that function.
    """

    def __init__(self, module: tvm.IRModule, read: Callable[[str], torch.Tensor]) -> None:
        function = module[WEIGHTS]
        self._definitions, self._read = Definitions(function), read
        fields = self._definitions.value(function.body.body).fields
        self._fields = dict(zip(map(str, function.attrs["stored"]), fields, strict=True))

    def evaluate(self, stored: StoredWeight) -> torch.Tensor:
        """The weight in the layout its kernel wants, contiguous."""
        plain = self._value(self._fields[stored.parameter])
        packed = plain.contiguous() if stored.layout is None else stored.layout.pack(plain)
        if list(packed.shape) != stored.spec.sizes():
            raise ModelError(
                f"weight {stored.name} has shape {list(packed.shape)}, expected {stored.spec.sizes()}"
            )
        return packed

    def _value(self, expr: Any) -> Any:
        value = self._definitions.value(expr)
        if isinstance(value, relax.Var):
            tensor = self._read(value.name)
            shape = [int(dim) for dim in value.ty.shape.values]
            if list(tensor.shape) != shape:
                raise ModelError(
                    f"{value.name}: shape {list(tensor.shape)} in the checkpoint, config.json says {shape}"
                )
            return tensor.to(getattr(torch, str(value.ty.dtype)))
        if isinstance(value, relax.Tuple):
            return [self._value(field) for field in value.fields]
        if isinstance(value, relax.Call) and value.op.name in OPERATORS:
            return OPERATORS[value.op.name](value, *(self._value(arg) for arg in value.args))
        raise UnsupportedError(f"operator {getattr(value, 'op', value)} on weights is not supported")


def write_shards(weights: Iterator[tuple[str, torch.Tensor]], directory: Path) -> list[str]:
    """Write (name, tensor) pairs as model-00001.safetensors and so on; returns the file names.

    A shard is closed when it holds `SHARD_BYTES`, so no more than that and one weight is in memory.
    """
    names: list[str] = []
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if shard:
            names.append(f"model-{len(names) + 1:05d}.safetensors")
            save_file(shard, directory / names[-1], metadata={"format": "pt"})
            shard.clear()

    for name, tensor in weights:
        if sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
    flush()
    return names
