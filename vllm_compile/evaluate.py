"""Evaluates expressions (`expression.py`) with torch.  Imports no TVM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch.nn import functional

from .expression import Node
from .spec import Sym

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "divide": torch.true_divide,
}


def evaluate(nodes: Sequence[Node], inputs: Mapping[str, torch.Tensor], wide: torch.dtype) -> list[torch.Tensor]:
    """The value of each node: computed in `wide`, rounded to the node's dtype; shapes and dtypes are the nodes' own."""
    tokens = next(_tokens(node, inputs) for node in nodes if Sym.TOKENS in node.shape)
    values: list[torch.Tensor] = []
    for node in nodes:
        shape = [tokens if dim == Sym.TOKENS else int(dim) for dim in node.shape]
        value = _value(node, [values[i] for i in node.operands], shape, inputs, wide)
        values.append(value.to(getattr(torch, node.dtype)))
    return values


def input_views(nodes: Sequence[Node], inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The inputs in the order and shapes in which the expression reads them."""
    tokens = next(_tokens(node, inputs) for node in nodes if Sym.TOKENS in node.shape)
    read = [node for node in nodes if node.op == "input"]
    return [
        inputs[n.parameters[0]].reshape([tokens if dim == Sym.TOKENS else int(dim) for dim in n.shape]) for n in read
    ]


def _tokens(node: Node, inputs: Mapping[str, torch.Tensor]) -> int:
    return inputs[node.parameters[0]].numel() // prod(int(dim) for dim in node.shape if dim != Sym.TOKENS)


def _value(
    node: Node, operands: list[torch.Tensor], shape: list[int], inputs: Mapping[str, torch.Tensor], wide: torch.dtype
) -> torch.Tensor:
    match node.op:
        case "input":
            return inputs[node.parameters[0]].reshape(shape)
        case "constant":
            device = next(iter(inputs.values())).device
            return torch.full(shape, node.parameters[0], dtype=torch.float32, device=device)
        case "power":
            return operands[0].to(wide) ** node.parameters[0]
        case "cast":
            return operands[0]
        case "slice":
            value = operands[0]
            for axis, ((begin, step), size) in enumerate(zip(node.parameters, shape, strict=True)):
                if (begin, step, size) != (0, 1, value.shape[axis]):
                    value = value.index_select(axis, begin + step * torch.arange(size, device=value.device))
            return value
        case "concat":
            return torch.cat(operands, dim=node.parameters[0])
        case "permute":
            return operands[0].permute(node.parameters)
        case "reshape":
            return operands[0].reshape(shape)
        case "mean":
            return operands[0].to(wide).mean(-1, keepdim=True)
    function = FUNCTIONS[node.op] if node.op in FUNCTIONS else getattr(torch, node.op)
    return function(*(operand.to(wide) for operand in operands))
