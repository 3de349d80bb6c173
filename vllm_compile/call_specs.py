"""Relax types and calls of our operators as plain data (`spec.py`)."""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx

from .ops import OwnOp
from .ops.base import arguments_of, attributes_of
from .spec import OpSpec, Sym, TensorSpec


def dimension(dim: Any) -> int | Sym:
    """A Relax dimension as plain data."""
    return int(dim) if isinstance(dim, tirx.IntImm | int) else Sym(dim.name)


def tensor_spec(type_: relax.TensorType) -> TensorSpec:
    """Type of an argument as plain data; leading unit axes before the tokens are dropped."""
    shape = tuple(dimension(dim) for dim in type_.shape.values)
    if Sym.TOKENS in shape:
        shape = shape[shape.index(Sym.TOKENS) :]
    return TensorSpec(shape, str(type_.dtype), strided=Sym.BLOCKS in shape)


def op_spec(op: OwnOp, call: relax.Call) -> OpSpec:
    """A call of one of our operators as plain data."""
    inputs = tuple((name, tensor_spec(arg.ty)) for name, arg in arguments_of(call).items())
    types = call.ty.fields if isinstance(call.ty, relax.TupleType) else [call.ty]
    written = types[: len(types) - len(op.updates)]
    attributes = attributes_of(call)
    outputs = tuple(tensor_spec(t) for t in written)
    options = frozenset(name for name in op.options if name in attributes)
    return OpSpec(op.name, inputs, outputs, tuple(sorted(attributes.items())), options)
