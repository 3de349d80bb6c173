"""Runs Relax functions with torch: each operator of ours by its reference, the others by their torch twin.

It knows nothing of passes, so running a module before and after one tells whether the pass kept
its meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import tvm
from tvm import relax, tirx
from tvm.ir.expr import GenericConst

from vllm_compile.ops import OPS
from vllm_compile.ops.base import PREFIX, arguments_of, attributes_of
from vllm_compile.relax_passes.base import Definitions

END = 2**31  # a slice up to here goes to the end of its axis


def _axes(values: Any) -> list[int]:
    return [int(value) for value in values]


def _slice(x: torch.Tensor, axes, begin, end, strides) -> torch.Tensor:
    index = [slice(None)] * x.ndim
    for axis, first, last, step in zip(axes, begin, end, strides, strict=True):
        index[axis] = slice(first, None if last > END else last, step)
    return x[tuple(index)]


def _split(call: relax.Call, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    where = call.attrs.indices_or_sections
    equal_parts = isinstance(where, int | tirx.IntImm)
    return torch.tensor_split(x, int(where) if equal_parts else _axes(where), dim=int(call.attrs.axis))


OPERATORS: dict[str, Callable[..., Any]] = {
    "relax.add": lambda call, a, b: a + b,
    "relax.subtract": lambda call, a, b: a - b,
    "relax.multiply": lambda call, a, b: a * b,
    "relax.divide": lambda call, a, b: a / b,
    "relax.exp": lambda call, x: x.exp(),
    "relax.sigmoid": lambda call, x: x.sigmoid(),
    "relax.sqrt": lambda call, x: x.sqrt(),
    "relax.tanh": lambda call, x: x.tanh(),
    "relax.nn.relu": lambda call, x: x.relu(),
    "relax.nn.gelu": lambda call, x: torch.nn.functional.gelu(x),
    "relax.nn.gelu_tanh": lambda call, x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relax.power": lambda call, x, exponent: x**exponent,
    "relax.negative": lambda call, x: -x,
    "relax.rsqrt": lambda call, x: x.rsqrt(),
    "relax.nn.silu": lambda call, x: torch.nn.functional.silu(x),
    "relax.nn.softmax": lambda call, x: x.softmax(int(call.attrs.axis)),
    "relax.topk": lambda call, x: tuple(x.topk(int(call.attrs.k), int(call.attrs.axis))),
    "relax.gather_elements": lambda call, x, index: x.gather(int(call.attrs.axis), index),
    "relax.clip": lambda call, x, least, most: x.clamp(least, most),
    "relax.sum": lambda call, x: x.sum(_axes(call.attrs.axis), keepdim=bool(call.attrs.keepdims)),
    "relax.mean": lambda call, x: x.mean(_axes(call.attrs.axis), keepdim=bool(call.attrs.keepdims)),
    "relax.astype": lambda call, x: x.to(getattr(torch, str(call.attrs.dtype))),
    "relax.concat": lambda call, parts: torch.cat(parts, dim=int(call.attrs.axis)),
    "relax.split": _split,
    "relax.permute_dims": lambda call, x: x.permute(_axes(call.attrs.axes)),
    "relax.expand_dims": lambda call, x: x.unsqueeze(*_axes(call.attrs.axis)),
    "relax.broadcast_to": lambda call, x, shape: x.expand(shape),
    "relax.reshape": lambda call, x, shape: x.reshape(shape),
    "relax.strided_slice": lambda call, x, *where: _slice(x, *where),
}


def run(module: tvm.IRModule, name: str, *arguments: torch.Tensor) -> Any:
    """The result of function `name`; tensors that an operator updates are changed in place."""
    return _Frame(module, module[name], arguments).run()


class _Frame:
    """One call of one function."""

    def __init__(self, module: tvm.IRModule, function: relax.Function, arguments: Any) -> None:
        self._module, self._function = module, function
        self._values: dict[relax.Var, Any] = {}
        self._dims: dict[tirx.Var, int] = {}
        for parameter, tensor in zip(function.params, arguments, strict=True):
            self._values[parameter] = tensor
            for dim, size in zip(parameter.ty.shape.values, tensor.shape, strict=True):
                known = self._dims.setdefault(dim, size) if isinstance(dim, tirx.Var) else int(dim)
                assert known == size, f"{parameter.name}: {list(tensor.shape)} is not {parameter.ty}"
            assert str(tensor.dtype) == f"torch.{parameter.ty.dtype}", parameter.name

    def run(self) -> Any:
        for binding in Definitions(self._function).bindings:
            value = self._value(binding.value)
            self._check(value, binding.var.ty)
            self._values[binding.var] = value
        return self._value(self._function.body.body)

    def _value(self, expr: Any) -> Any:
        if isinstance(expr, relax.Call):
            return self._call(expr)
        if isinstance(expr, relax.Tuple):
            return tuple(self._value(field) for field in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self._value(expr.tuple_value)[int(expr.index)]
        if isinstance(expr, relax.ShapeExpr):
            return [self._dim(dim) for dim in expr.values]
        if isinstance(expr, GenericConst):
            dtype = getattr(torch, str(expr.ty.dtype))
            return torch.from_numpy(expr.value.numpy().astype("float64")).to(dtype)
        if isinstance(expr, tirx.IntImm):
            return int(expr)
        if isinstance(expr, tirx.FloatImm):
            return float(expr.value)
        return self._values[expr]

    def _call(self, call: relax.Call) -> Any:
        if isinstance(call.op, tvm.ir.GlobalVar):
            callee = self._module[call.op]
            return _Frame(self._module, callee, [self._value(arg) for arg in call.args]).run()
        if call.op.name in OPERATORS:
            return OPERATORS[call.op.name](call, *(self._value(arg) for arg in call.args))
        return self._own(call)

    def _own(self, call: relax.Call) -> Any:
        """One of our operators; those on a KV cache are defined without the leading unit axes."""
        op = OPS[call.op.name.removeprefix(PREFIX)]
        inputs = {name: self._value(arg) for name, arg in arguments_of(call).items()}
        if "kv" in inputs:
            for name in ("q", "k", "v", "qkv", "cos", "sin"):
                while name in inputs and inputs[name].shape[0] == 1 and inputs[name].ndim > RANK[name]:
                    inputs[name] = inputs[name][0]
        result = op.reference(**inputs, **attributes_of(call))
        if isinstance(call.ty, relax.TupleType):
            result = (*(result if isinstance(result, tuple) else (result,)), *(inputs[n] for n in op.updates))
            return tuple(map(self._shaped, result, call.ty.fields))
        return self._shaped(result, call.ty)

    def _shaped(self, tensor: torch.Tensor, type_: relax.TensorType) -> torch.Tensor:
        return tensor.view([self._dim(dim) for dim in type_.shape.values])

    def _dim(self, dim: Any) -> int:
        return self._dims[dim] if isinstance(dim, tirx.Var) else int(dim)

    def _check(self, value: Any, type_: Any) -> None:
        """What was computed has the type that Relax inferred."""
        if isinstance(type_, relax.TensorType):
            assert list(value.shape) == [self._dim(dim) for dim in type_.shape.values]
            assert str(value.dtype) == f"torch.{type_.dtype}"
        elif isinstance(type_, relax.TupleType):
            for item, field in zip(value, type_.fields, strict=True):
                self._check(item, field)


RANK = {"q": 3, "k": 3, "v": 3, "qkv": 2, "cos": 2, "sin": 2}
