"""Complex numbers become their real and imaginary parts, which every later stage knows how to compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from vllm_compile.errors import UnsupportedError

from .nodes import args, insert_before, name, place

aten = torch.ops.aten
Parts = tuple[fx.Node, fx.Node]

# What is done to each part alike; casts between complex dtypes do not occur.
ON_EACH = {aten.unsqueeze.default}
NOTHING = {aten.alias.default, aten.to.dtype, aten.to.dtype_layout}


def split_complex(graph: fx.Graph) -> None:
    """Rewrite, in place, rotations that are products of complex numbers.

    Before:
        y = view_as_real(view_as_complex(x) * polar(ones, angles))
    After:
        (a, b), (cos, sin) = the halves of x's last axis, the halves of view_as_real(polar(ones, angles))'s
        y = stack([a * cos - b * sin, a * sin + b * cos], -1)
    `polar` itself stays: it depends on the position alone, so that its parts become tables.

    Raises:
        UnsupportedError: something else is done with complex numbers, or with such as the graph is given; operator and
            module are named.
    """
    parts: dict[fx.Node, Parts] = {}
    for node in list(graph.nodes):
        if node.target is aten.view_as_real.default:
            joined = insert_before(node, aten.stack.default, list(_parts(args(node)[0], node, parts)), -1)
            node.replace_all_uses_with(joined)
            graph.erase_node(node)
        elif _is_complex(node) and node.op == "call_function":
            parts[node] = _split(node, parts)
    for node in reversed(parts):
        for check in [user for user in node.users if user.target is aten._assert_tensor_metadata.default]:
            graph.erase_node(check)
        if not node.users:
            graph.erase_node(node)


def _parts(value: Any, user: fx.Node, parts: dict[fx.Node, Parts]) -> Parts:
    """The parts of an operand of `user`: known unless it is a real number, or complex from the outset."""
    if not isinstance(value, fx.Node) or value not in parts:
        raise _unsupported(user)
    return parts[value]


def _unsupported(node: fx.Node) -> UnsupportedError:
    return UnsupportedError(f"operator {name(node)} of complex numbers ({place(node)}) is not supported")


def _is_complex(value: object) -> bool:
    if isinstance(value, complex):
        return True
    recorded = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(recorded, torch.Tensor) and recorded.is_complex()


def _split(node: fx.Node, parts: dict[fx.Node, Parts]) -> Parts:
    first, *rest = args(node)
    if node.target is aten.view_as_complex.default:
        return _halves(node, first)
    if node.target is aten.polar.default:
        pairs = insert_before(node.next, aten.view_as_real.default, node)
        return _halves(pairs.next, pairs)
    if node.target in NOTHING:
        return _parts(first, node, parts)
    if node.target in ON_EACH:
        real, imaginary = (insert_before(node, node.target, part, *rest) for part in _parts(first, node, parts))
        return real, imaginary
    if node.target is aten.mul.Tensor:
        return _product(node, parts)
    raise _unsupported(node)


def _halves(where: fx.Node, pairs: fx.Node) -> Parts:
    """The first and the second of the two numbers on the last axis."""
    real, imaginary = (insert_before(where, aten.select.int, pairs, -1, index) for index in (0, 1))
    return real, imaginary


def _product(node: fx.Node, parts: dict[fx.Node, Parts]) -> Parts:
    def times(x, y):
        return insert_before(node, aten.mul.Tensor, x, y)

    left, right = args(node)
    if not (_is_complex(left) and _is_complex(right)):
        number, other = (left, right) if _is_complex(right) else (right, left)
        real, imaginary = (times(part, number) for part in _parts(other, node, parts))
        return real, imaginary
    (a, b), (c, d) = _parts(left, node, parts), _parts(right, node, parts)
    real = insert_before(node, aten.sub.Tensor, times(a, c), times(b, d))
    return real, insert_before(node, aten.add.Tensor, times(a, d), times(b, c))
