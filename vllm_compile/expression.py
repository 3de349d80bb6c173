"""Elementwise expressions as plain data: what the operator `elementwise` computes, node by node.

Nothing here imports TVM or torch: passes write expressions, kernels and references read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .spec import Dim, Sym

# A function of one value, of two; each rounds its result to the node's dtype.
UNARY = frozenset(
    {"abs", "exp", "gelu", "gelu_tanh", "negative", "relu", "rsqrt", "sigmoid", "silu", "sqrt", "square", "tanh"}
)
BINARY = frozenset({"add", "divide", "maximum", "minimum", "multiply", "subtract"})


class Node(NamedTuple):
    """One value of an expression.

    Attributes:
        op: a name of UNARY or BINARY, or one of
            `input` (parameters: its name),
            `constant` (a number),
            `power` (a whole exponent from 2 on),
            `cast` (to `dtype`),
            `slice` (first index and step on each axis; a step of 0 repeats it),
            `concat` (an axis),
            `mean` (over the last axis, which is then 1),
            `permute` (the operand's axis for each axis),
            `reshape`.
        operands: numbers of earlier nodes; those of a binary operator are broadcast as in NumPy.
        shape: `Sym.TOKENS` for the tokens.
        dtype: float32 or bfloat16.
        parameters: see `op`.
    """

    op: str
    operands: tuple[int, ...]
    shape: tuple[Dim, ...]
    dtype: str
    parameters: tuple[Any, ...] = ()


Expression = tuple[Node, ...]


def read_expression(attribute: Sequence[Sequence[Any]]) -> Expression:
    """The expression that an attribute of a Relax call holds as nested arrays; its last node is the result."""
    return tuple(
        Node(str(op), tuple(map(int, operands)), tuple(map(_dim, shape)), str(dtype), tuple(parameters))
        for op, operands, shape, dtype, parameters in attribute
    )


def _dim(dim: Any) -> Dim:
    return Sym.TOKENS if isinstance(dim, str) else int(dim)
