"""Elementwise expressions that kernels of every target are tested with."""

from __future__ import annotations

import torch

from vllm_compile.expression import BINARY, UNARY, Node
from vllm_compile.spec import OpSpec, Sym, TensorSpec

T = Sym.TOKENS
POSITIVE = {"sqrt", "rsqrt"}


def inputs_of(nodes, generator, tokens):
    """A tensor for each input node; leading unit axes are not in memory."""
    made = {}
    for node in nodes:
        if node.op == "input":
            shape = node.shape[node.shape.index(T) :] if T in node.shape else node.shape
            values = torch.randn([tokens if dim == T else dim for dim in shape], generator=generator) * 2
            made[node.parameters[0]] = values.to(getattr(torch, node.dtype))
    return made


def spec_of(nodes):
    tensors = [
        (n.parameters[0], TensorSpec(n.shape[n.shape.index(T) :] if T in n.shape else n.shape, n.dtype))
        for n in nodes
        if n.op == "input"
    ]
    out = nodes[-1]
    attributes = (("expression", tuple(nodes)),)
    return OpSpec("elementwise", tuple(tensors), (TensorSpec(out.shape[out.shape.index(T) :], out.dtype),), attributes)


def every_function(dtype, width):
    """All of them side by side in one concat."""
    row = (T, width)
    nodes = [Node("input", (), row, dtype, ("x0",)), Node("input", (), (width,), dtype, ("x1",))]
    nodes += [Node("multiply", (0, 0), row, dtype), Node("constant", (), (), dtype, (0.25,))]
    nodes += [Node("add", (2, 3), row, dtype)]
    parts = []
    for name in sorted(UNARY | BINARY):
        operands = (0, 1) if name in BINARY else (4,) if name in POSITIVE else (0,)
        nodes.append(Node(name, operands, row, dtype))
        parts.append(len(nodes) - 1)
    nodes.append(Node("power", (0,), row, dtype, (3,)))
    parts.append(len(nodes) - 1)
    return [*nodes, Node("concat", tuple(parts), (T, width * len(parts)), dtype, (1,))]


def rotation(dtype, interleaved, heads=3, head_dim=32):
    """Heads of a wider projection, rotated: slices, permutations, concatenations."""
    width = 2 * heads * head_dim
    rows, split = (1, T, width), (1, heads, T, head_dim)
    half = (1, heads, T, head_dim // 2)
    step, second = (2, 1) if interleaved else (1, head_dim // 2)
    return [
        Node("input", (), rows, dtype, ("x0",)),
        Node("slice", (0,), (1, T, heads * head_dim), dtype, ((0, 1), (0, 1), (heads * head_dim, 1))),
        Node("reshape", (1,), (1, T, heads, head_dim), dtype),
        Node("permute", (2,), split, dtype, (0, 2, 1, 3)),
        Node("input", (), (1, T, head_dim), dtype, ("x1",)),
        Node("reshape", (4,), (1, 1, T, head_dim), dtype),
        Node("multiply", (3, 5), split, dtype),
        Node("slice", (3,), half, dtype, ((0, 1), (0, 1), (0, 1), (0, step))),
        Node("slice", (3,), half, dtype, ((0, 1), (0, 1), (0, 1), (second, step))),
        Node("negative", (8,), half, dtype),
        *(
            [
                Node("reshape", (9,), (*half, 1), dtype),
                Node("reshape", (7,), (*half, 1), dtype),
                Node("concat", (10, 11), (*half, 2), dtype, (4,)),
                Node("reshape", (12,), split, dtype),
            ]
            if interleaved
            else [Node("concat", (9, 7), split, dtype, (3,))]
        ),
        Node("add", (6, 13 if interleaved else 10), split, dtype),
        Node("permute", (14 if interleaved else 11,), (1, T, heads, head_dim), dtype, (0, 2, 1, 3)),
    ]


def weighted_sum(width):
    """A residual and the results of two experts, weighed: what is left of a mixture of experts."""
    row, both, one = (T, width), (T, 2, width), (T, 1, width)
    return [
        Node("input", (), row, "bfloat16", ("x0",)),
        Node("input", (), both, "bfloat16", ("x1",)),
        Node("input", (), (T, 2), "float32", ("x2",)),
        Node("cast", (1,), both, "float32"),
        Node("reshape", (2,), (T, 2, 1), "float32"),
        Node("multiply", (3, 4), both, "float32"),
        Node("slice", (5,), one, "float32", ((0, 1), (0, 1), (0, 1))),
        Node("slice", (5,), one, "float32", ((0, 1), (1, 1), (0, 1))),
        Node("add", (6, 7), one, "float32"),
        Node("cast", (8,), one, "bfloat16"),
        Node("reshape", (9,), row, "bfloat16"),
        Node("add", (0, 10), row, "bfloat16"),
    ]
