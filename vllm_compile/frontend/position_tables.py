"""Values that depend on the position alone become tables: RoPE's cosines and sines.

They are computed once, at compile time, by the model's own torch code, so they are Hugging
Face's values to the last bit; at run time a row is looked up by position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx

VIEWS = {torch.ops.aten.unsqueeze.default}
FREE = {torch.ops.aten._assert_tensor_metadata.default}


@dataclass(frozen=True)
class LongSequences:
    """What a model computes of positions where sequences may be longer than it is served for by default.

    Attributes:
        positions: how many they have; 0 if there are none such.
        buffers: the values that buffers have then, by their names in the traced program.
    """

    positions: int = 0
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)


def tabulate_positions(
    program: torch.export.ExportedProgram, positions: fx.Node, max_positions: int, long: LongSequences
) -> list[torch.Tensor]:
    """Replace, in place, each maximal position-only value [1, T, D] by a lookup in a table.

    Returns the tables, [max_positions + long.positions, D] each, in the order of `position_table`'s index: the rows of
    long sequences come last.  Whole numbers [1, T] (positions, counted in another way) give tables without D.
    """
    graph = program.graph
    constants = _constants(program)
    only_position = _reach(graph, positions, constants)
    frontier = [
        node
        for node in graph.nodes
        if node in only_position and node.target not in VIEWS and _is_needed(node, only_position)
    ]
    tables = _evaluate(graph, frontier, positions, constants, max_positions)
    if long.positions:
        changed = _constants(program, long.buffers)
        rows = _evaluate(graph, frontier, positions, changed, long.positions)
        tables = [torch.cat(pair) for pair in zip(tables, rows, strict=True)]
    for index, (node, table) in enumerate(zip(frontier, tables, strict=True)):
        with graph.inserting_after(node):
            lookup = graph.call_function(
                torch.ops.vllm_compile.position_table.default, (positions, index, table.shape[-1], table.dtype)
            )
        lookup.meta = dict(node.meta)
        node.replace_all_uses_with(_with_unit_axes(lookup))
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    return tables


def _with_unit_axes(lookup: fx.Node) -> fx.Node:
    """Rows [1, T, D] of a table, with the unit axes besides of the value they stand for, which `lookup` records."""
    value = lookup.meta["val"]
    if not value.is_floating_point():
        return lookup
    tokens = next((axis for axis, size in enumerate(value.shape) if not isinstance(size, int)), 1)
    axes = [axis for axis in range(1, value.dim() - 1) if axis != max(tokens, 1) and value.shape[axis] == 1]
    with value.fake_mode:
        lookup.meta["val"] = value.squeeze(axes)
    for axis in axes:
        before = lookup
        with before.graph.inserting_after(before):
            lookup = before.graph.call_function(torch.ops.aten.unsqueeze.default, (before, axis))
        with value.fake_mode:
            lookup.meta = {**before.meta, "val": before.meta["val"].unsqueeze(axis)}
    return lookup


def _constants(
    program: torch.export.ExportedProgram, changed: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Placeholders whose values are known: buffers and lifted constants, some of them `changed`."""
    values = {**dict(program.named_buffers()), **program.constants, **(changed or {})}
    specs = program.graph_signature.input_specs
    return {spec.arg.name: values[spec.target] for spec in specs if spec.target in values}


def _reach(graph: fx.Graph, positions: fx.Node, constants: dict[str, torch.Tensor]) -> set[fx.Node]:
    """Nodes computed from `positions` (at least) and constants (at most)."""
    known, reached = set(), {positions}
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.name in constants:
                known.add(node)
        elif node.op == "call_function" and node.target not in FREE:
            inputs = set(node.all_input_nodes)
            if inputs <= known:
                known.add(node)
            elif inputs <= known | reached and isinstance(node.meta.get("val"), torch.Tensor):
                reached.add(node)
    return reached - {positions}


def _is_needed(node: fx.Node, only_position: set[fx.Node]) -> bool:
    """True if something that is no position-only value uses the node, maybe through views of it."""
    return any(
        user.target not in FREE
        and (user not in only_position or (user.target in VIEWS and _is_needed(user, only_position)))
        for user in node.users
    )


def _evaluate(
    graph: fx.Graph,
    frontier: list[fx.Node],
    positions: fx.Node,
    constants: dict[str, torch.Tensor],
    max_positions: int,
) -> list[torch.Tensor]:
    values: dict[fx.Node, object] = {positions: torch.arange(max_positions)}

    def value(node: fx.Node):
        if node not in values:
            if node.op == "placeholder":
                values[node] = constants[node.name]
            else:
                args = fx.map_arg((node.args, node.kwargs), value)
                values[node] = cast(Callable, node.target)(*_with_cpu(args[0]), **args[1])
        return values[node]

    return [_table(value(node)) for node in frontier]


def _table(value: torch.Tensor) -> torch.Tensor:
    return (value.flatten(0, -2) if value.is_floating_point() else value.flatten()).contiguous()


def _with_cpu(args):
    """The traced graph names the device it was traced on; the table is made on the CPU."""
    return [torch.device("cpu") if isinstance(arg, torch.device) else arg for arg in args]
