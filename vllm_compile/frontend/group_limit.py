"""Routers that keep a few groups of experts, by the best scores of each, and choose among those (DeepSeek-V2, V3)."""

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
        good = max(view(scores, [-1, G, E / G]), -1).values
        kept = scatter(zeros_like(good), 1, topk(good, n).indices, 1)
        y = masked_fill(scores, ~to(reshape(expand(unsqueeze(kept, -1))), bool), 0)
    After:
        y = limit_groups(scores, G, n, 1, True)
    A group may be as good as the sum of its b largest scores, `sum(topk(view(scores, ...), b).values, -1)`; what is in
    no group that is kept may be minus infinity.
    """
    for node in [node for node in graph.nodes if node.target is aten.masked_fill.Scalar]:
        scores, mask, value = args(node)
        if value in (0, float("-inf")) and (limit := _groups(scores, mask)) is not None:
            operands = scores, *limit, value == 0
            limited = insert_before(node, torch.ops.vllm_compile.limit_groups.default, *operands)
            node.replace_all_uses_with(limited)
            graph.erase_node(node)


def _groups(scores: fx.Node, mask: fx.Node) -> tuple[int, int, int] | None:
    """How many groups there are, how many are kept, and how many scores of each make it good.

    None unless `mask` says which of `scores` are in no group that is kept.
    """
    kept = _operand(_operand(mask, aten.bitwise_not.default), aten.to.dtype)
    repeated = _operand(kept, *VIEWS)
    unsqueezed = _operand(repeated, aten.expand.default)
    by_group = _operand(unsqueezed, aten.unsqueeze.default)
    if by_group is None or by_group.target is not aten.scatter.value:
        return None
    zeros, axis, chosen, one = args(by_group)
    top = _item(chosen, 1, aten.topk.default)
    good = None if top is None else args(top)[0]
    if good is None or _operand(zeros, aten.zeros_like.default) is not good:
        return None
    in_groups, best = _best(good)
    if in_groups is None:
        return None
    shape = in_groups.meta["val"].shape
    same = _operand(in_groups, *VIEWS) is scores and repeated.meta["val"].shape == shape and len(shape) == 3
    axes = axis in (1, -1) and args(unsqueezed)[1] in (2, -1)
    return (int(shape[1]), int(args(top)[1]), best) if same and axes and _falling(top) and one == 1 else None


def _best(good: fx.Node) -> tuple[Any, int]:
    """What `good` is the largest of along the last axis, or the sum of the largest, and how many; None if neither."""
    largest = _item(good, 0, aten.max.dim)
    if largest is not None:
        return (args(largest)[0] if args(largest)[1] in (2, -1) else None), 1
    top = _item(_operand(good, aten.sum.dim_IntList), 0, aten.topk.default)
    summed = top is not None and args(good)[1] in ([2], [-1]) and len(args(good)) == 2 and _falling(top)
    return (args(top)[0], int(args(top)[1])) if summed else (None, 0)


def _falling(top: fx.Node) -> bool:
    """Whether a topk takes the largest along the last axis."""
    return args(top)[2:4] in ((), (-1,), (-1, True))


def _operand(node: Any, *targets: Any) -> Any:
    """The first operand of a call of one of these operators, else None."""
    return args(node)[0] if isinstance(node, fx.Node) and node.target in targets else None


def _item(node: Any, index: int, target: Any) -> Any:
    """The call of an operator that `node` is result `index` of."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem or args(node)[1] != index:
        return None
    call = args(node)[0]
    return call if call.target is target else None
