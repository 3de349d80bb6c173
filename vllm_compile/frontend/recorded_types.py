"""What torch.export recorded of each value, beside what the value was converted to.

TVM's converters of torch operators drop an argument now and then, mostly the dtype that a sum or a softmax is to be
computed in: the model would still run, and round where Hugging Face does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from tvm import relax, tirx


def difference(node: fx.Node, converted: Any) -> str | None:
    """How a converted value differs from the one recorded for `node`, in words; None if it does not.

    A tensor must become one.  Dtypes must be equal, and so must the rank and all extents that both sides know as
    numbers.  What is recorded as no tensor (sizes, lists of them) is not looked at.
    """
    recorded, types = _tensors(node.meta.get("val")), list(_types(converted))
    if not any(isinstance(value, torch.Tensor) for value in recorded):
        return None
    if len(types) != len(recorded):
        return f"it becomes {len(types)} values, the model has {len(recorded)}"
    for value, type_ in zip(recorded, types, strict=True):
        if value is None:
            continue
        if not isinstance(type_, relax.TensorType):
            return f"it becomes no tensor, the model has {_of(value)}"
        ours, theirs = _described(_extents(type_), str(type_.dtype)), _of(value)
        if str(type_.dtype) != str(value.dtype).removeprefix("torch.") or not _agree(_extents(type_), value.shape):
            return f"it becomes {ours}, the model has {theirs}"
    return None


def _tensors(recorded: Any) -> list[torch.Tensor | None]:
    several = recorded if isinstance(recorded, list | tuple) else [recorded]
    return [value if isinstance(value, torch.Tensor) else None for value in several]


def _types(converted: Any) -> Iterator[Any]:
    """Types of the tensors that a converter returned: one, several, or one tuple of them."""
    if isinstance(converted, list | tuple | relax.Tuple):
        for field in converted:
            yield getattr(field, "ty", None)
    else:
        type_ = getattr(converted, "ty", None)
        yield from type_.fields if isinstance(type_, relax.TupleType) else [type_]


def _extents(type_: relax.TensorType) -> list[int | None] | None:
    """Of each axis, None where it is bound at each call; None for all if not even the rank is known."""
    if not isinstance(type_.shape, relax.ShapeExpr):
        return None
    return [int(dim) if isinstance(dim, int | tirx.IntImm) else None for dim in type_.shape.values]


def _agree(ours: list[int | None] | None, theirs: torch.Size) -> bool:
    if ours is None:
        return True
    return len(ours) == len(theirs) and all(
        a == b for a, b in zip(ours, theirs, strict=True) if isinstance(a, int) and isinstance(b, int)
    )


def _of(value: torch.Tensor) -> str:
    extents: list[int | None] = [dim if isinstance(dim, int) else None for dim in value.shape]
    return _described(extents, str(value.dtype).removeprefix("torch."))


def _described(extents: list[int | None] | None, dtype: str) -> str:
    known = "?" if extents is None else ", ".join("T" if dim is None else str(dim) for dim in extents)
    return f"{dtype} [{known}]"
