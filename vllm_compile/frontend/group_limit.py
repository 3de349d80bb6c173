"""Routers that keep a few groups of experts, by the best score of each, and choose among those (DeepSeek-V2)."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from . import torch_ops  # noqa: F401  (defines the operator below)
from .nodes import args, insert_before

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default)


def name_group_limits(graph: fx.Graph) -> None:
    """Rewrite, in place.

    Before:
        best = max(view(scores, [-1, G, E / G]), -1).values
        kept = scatter(zeros_like(best), 1, topk(best, n).indices, 1)
        y = masked_fill(scores, ~to(reshape(expand(unsqueeze(kept, -1))), bool), 0)
    After:
        y = limit_groups(scores, G, n)
    """
    for node in [node for node in graph.nodes if node.target is aten.masked_fill.Scalar]:
        scores, mask, value = args(node)
        if value == 0 and (limit := _groups(scores, mask)) is not None:
            limited = insert_before(node, torch.ops.vllm_compile.limit_groups.default, scores, *limit)
            node.replace_all_uses_with(limited)
            graph.erase_node(node)


def _groups(scores: fx.Node, mask: fx.Node) -> tuple[int, int] | None:
    """How many groups there are, and how many are kept, if `mask` says which of `scores` are in none of those."""
    kept = _operand(_operand(mask, aten.bitwise_not.default), aten.to.dtype)
    repeated = _operand(kept, *VIEWS)
    unsqueezed = _operand(repeated, aten.expand.default)
    by_group = _operand(unsqueezed, aten.unsqueeze.default)
    if by_group is None or by_group.target is not aten.scatter.value:
        return None
    zeros, axis, chosen, one = args(by_group)
    top = _item(chosen, 1, aten.topk.default)
    best = None if top is None else args(top)[0]
    largest = _item(best, 0, aten.max.dim)
    if best is None or largest is None or _operand(zeros, aten.zeros_like.default) is not best:
        return None
    in_groups = args(largest)[0]
    shape = in_groups.meta["val"].shape
    same = _operand(in_groups, *VIEWS) is scores and repeated.meta["val"].shape == shape and len(shape) == 3
    axes = axis in (1, -1) and {args(largest)[1], args(unsqueezed)[1]} <= {2, -1}
    falling = args(top)[2:4] in ((), (-1,), (-1, True))
    return (int(shape[1]), int(args(top)[1])) if same and axes and falling and one == 1 else None


def _operand(node: Any, *targets: Any) -> Any:
    """The first operand of a call of one of these operators, else None."""
    return args(node)[0] if isinstance(node, fx.Node) and node.target in targets else None


def _item(node: Any, index: int, target: Any) -> Any:
    """The call of an operator that `node` is result `index` of."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or args(node)[1] != index:
        return None
    call = args(node)[0]
    return call if call.target is target else None
