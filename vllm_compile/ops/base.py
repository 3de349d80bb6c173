"""How an operator of ours is described, registered with Relax, called and recognised.

An operator carries the meaning of a piece of a Transformer through the passes.  Its
`reference` is its definition: unit tests, correctness gates of tuning and `verify`
all compare against that one function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi
from tvm import relax
from tvm.ir.op import register_op_attr

PREFIX = "vllm_compile."


@dataclass(frozen=True)
class Tolerance:
    """`|ours - reference| <= atol + rtol * |reference|`, and why that much is allowed."""

    rtol: float
    atol: float
    reason: str


@dataclass(frozen=True)
class OwnOp:
    """One operator.

    Attributes:
        name: short name, `rms_norm`; Relax sees `vllm_compile.rms_norm`.
        infer: maps (types of the inputs by name, attributes) to the result type.
        reference: plain torch on CPU tensors, `reference(**inputs, **attributes)`; computes
            in the inputs' dtypes with the roundings of the model it came from.
        sample: `sample(generator, dtype)` -> (inputs, attributes), small and random.
        tolerance: per dtype of the activations.
        weights: names of the inputs that are model weights (a pass may change their layout).
        updates: names of the inputs that the operator changes in place.  Each is also a result
            in Relax, after the ordinary ones, so that data flow orders reads after writes.
        options: names of the attributes that a call may leave out.  A kernel family that does not
            know an option never serves a call that has it.
    """

    name: str
    infer: Callable[[dict[str, Any], dict[str, Any]], Any]
    reference: Callable[..., Any]
    sample: Callable[..., tuple[dict[str, Any], dict[str, Any]]]
    tolerance: dict[str, Tolerance]
    weights: tuple[str, ...] = ()
    updates: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    relax_op: Any = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        full_name = PREFIX + self.name
        tvm_ffi.get_global_func("ir.RegisterOp")(full_name, full_name)
        op = tvm.ir.Op.get(full_name)
        op.set_num_inputs(-1)
        register_op_attr(full_name, "FInferType", lambda call, _: self.infer(inputs_of(call), attributes_of(call)))
        register_op_attr(full_name, "FPurity", True)
        register_op_attr(full_name, "TScriptPrinterName", full_name)
        object.__setattr__(self, "relax_op", op)

    def __call__(self, inputs: dict[str, relax.Expr], **attributes: Any) -> relax.Call:
        """A Relax call with named inputs; an input that is None, and an option that is None or 0, is left out."""
        given = {name: expr for name, expr in inputs.items() if expr is not None}
        attributes = {name: value for name, value in attributes.items() if value or name not in self.options}
        attrs = tvm.ir.make_node("ir.DictAttrs", inputs=list(given), **attributes)
        return relax.Call(self.relax_op, list(given.values()), attrs)

    def matches(self, expr: Any) -> bool:
        """True if `expr` is a call of this operator."""
        return isinstance(expr, relax.Call) and self.relax_op.same_as(expr.op)


def arguments_of(call: relax.Call) -> dict[str, relax.Expr]:
    """The inputs of a call of one of our operators, by name."""
    return dict(zip((str(name) for name in call.attrs["inputs"]), call.args, strict=True))


def inputs_of(call: relax.Call) -> dict[str, Any]:
    """The types of the inputs of a call of one of our operators, by name."""
    return {name: expr.ty for name, expr in arguments_of(call).items()}


def attributes_of(call: relax.Call) -> dict[str, Any]:
    """The attributes of a call of one of our operators, arrays as tuples."""
    return {str(key): _plain(call.attrs[key]) for key in call.attrs.keys() if key != "inputs"}  # noqa: SIM118


def _plain(value: Any) -> Any:
    """An attribute as plain Python data, which can be compared and hashed."""
    if isinstance(value, str):
        return str(value)
    return tuple(map(_plain, value)) if isinstance(value, Sequence) else value


def like(type_: Any, *, last: Sequence[Any] | None = None) -> relax.TensorType:
    """The tensor type `type_`, its last axis replaced by the axes `last` if given."""
    shape = list(type_.shape.values)
    return relax.TensorType(shape if last is None else [*shape[:-1], *last], type_.dtype)
