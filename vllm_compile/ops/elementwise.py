"""Elementwise work of any kind, fused: what is left of a model between the operators with a name of their own.

Its meaning is its attribute, an expression (`vllm_compile/expression.py`) over the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.nn import functional
from tvm import relax, tirx

from vllm_compile.expression import Node, read_expression
from vllm_compile.spec import Sym

from .base import OwnOp, Tolerance

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "divide": torch.true_divide,
}


def reference(expression: tuple, **inputs: torch.Tensor) -> torch.Tensor:
    """Evaluates the nodes in order, each in float64 and rounded to its dtype; shapes and dtypes are the nodes' own."""
    nodes, values = read_expression(expression), list[torch.Tensor]()
    tokens = next(_tokens(node, inputs) for node in nodes if Sym.TOKENS in node.shape)
    for node in nodes:
        shape = [tokens if dim == Sym.TOKENS else int(dim) for dim in node.shape]
        value = _value(node, [values[i] for i in node.operands], shape, inputs)
        values.append(value.to(getattr(torch, node.dtype)))
    return values[-1]


def _tokens(node: Node, inputs: dict[str, torch.Tensor]) -> int:
    return inputs[node.parameters[0]].numel() // prod(int(dim) for dim in node.shape if dim != Sym.TOKENS)


def _value(node: Node, operands: list, shape: list[int], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    match node.op:
        case "input":
            return inputs[node.parameters[0]].view(shape)
        case "constant":
            return torch.full(shape, node.parameters[0])
        case "power":
            return operands[0] ** node.parameters[0]
        case "cast":
            return operands[0]
        case "slice":
            value = operands[0]
            for axis, ((begin, step), size) in enumerate(zip(node.parameters, shape, strict=True)):
                value = value.index_select(axis, begin + step * torch.arange(size))
            return value
        case "concat":
            return torch.cat(operands, dim=node.parameters[0])
        case "permute":
            return operands[0].permute(node.parameters)
        case "reshape":
            return operands[0].reshape(shape)
    function = FUNCTIONS[node.op] if node.op in FUNCTIONS else getattr(torch, node.op)
    return function(*(operand.double() for operand in operands))


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, width: int = 96):
    """tanh(x * weight + 0.5) + silu(y)"""
    name = str(dtype).removeprefix("torch.")
    row = (Sym.TOKENS, width)
    expression = (
        Node("input", (), row, name, ("x0",)),
        Node("input", (), (width,), name, ("x1",)),
        Node("input", (), row, name, ("x2",)),
        Node("constant", (), (), name, (0.5,)),
        Node("multiply", (0, 1), row, name),
        Node("add", (4, 3), row, name),
        Node("tanh", (5,), row, name),
        Node("silu", (2,), row, name),
        Node("add", (6, 7), row, name),
    )
    shapes = {"x0": (tokens, width), "x1": (width,), "x2": (tokens, width)}
    inputs = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
    return inputs, {"expression": expression}


def infer(i: dict[str, Any], a: dict[str, Any]) -> relax.TensorType:
    nodes = read_expression(a["expression"])
    dims = (dim for type_ in i.values() for dim in type_.shape.values if isinstance(dim, tirx.Var))
    tokens = next(dim for dim in dims if dim.name == Sym.TOKENS)
    return relax.TensorType([tokens if dim == Sym.TOKENS else dim for dim in nodes[-1].shape], nodes[-1].dtype)


ELEMENTWISE = OwnOp(
    "elementwise",
    infer,
    reference,
    sample,
    {
        "float32": Tolerance(2e-6, 1e-6, "exponentials by polynomials of our own, good to 2**-22"),
        "bfloat16": Tolerance(2**-7, 1e-3, "a value may be rounded to its neighbour"),
    },
)
