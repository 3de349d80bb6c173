"""Nodes of a traced graph: where they come from, and new ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def place(node: fx.Node) -> str:
    """The module of the model that a node comes from."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    return str(modules[-1][0]).removeprefix("model.") if modules else "outside all modules"


def name(node: fx.Node) -> str:
    """The operator a node calls, as torch writes it: `mul.Tensor`."""
    return getattr(node.target, "__name__", str(node.target))


def args(node: fx.Node) -> tuple[Any, ...]:
    """What an operator is called with, by position; nodes and plain values alike."""
    return tuple(node.args)


def insert_before(node: fx.Node, target: Callable[..., Any], *operands: Any) -> fx.Node:
    """A new call in front of `node`, with what torch.export would record of it, in the module of its first operand."""
    with node.graph.inserting_before(node):
        call = node.graph.call_function(target, operands)
    first = call.all_input_nodes[0]
    with first.meta["val"].fake_mode:
        value = target(*fx.map_arg(operands, lambda operand: operand.meta["val"]))
    call.meta = {**first.meta, "val": value}
    return call
