"""Elementwise work of any kind, fused: what is left of a model between the operators with a name of their own.

Its meaning is its attribute, an expression (`vllm_compile/expression.py`) over the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from tvm import relax, tirx

from vllm_compile.evaluate import evaluate
from vllm_compile.expression import Node, read_expression
from vllm_compile.spec import Sym

from .base import OwnOp, Tolerance


def reference(expression: tuple, **inputs: torch.Tensor) -> torch.Tensor:
    """Evaluates the nodes in order, each in float64 and rounded to its dtype; shapes and dtypes are the nodes' own."""
    return evaluate(read_expression(expression), inputs, torch.float64)[-1]


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
