"""Writes into tensors become values: what is filled part by part a concatenation, what is scattered a new tensor."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from vllm_compile.errors import UnsupportedError

from .nodes import args, insert_before, name, place

aten = torch.ops.aten
EMPTY = {aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default}


def replace_writes(graph: fx.Graph) -> None:
    """Rewrite, in place, buffers whose parts along one axis are each written once, and what is scattered into zeros.

    Before:
        y = new_empty(...); copy_(slice(y, axis, 0, n), a); copy_(slice(y, axis, n), b)
        z = zeros_like(...); scatter_(z, axis, index, 1)
    After:
        y = cat([a, b], axis)
        z = scatter(zeros_like(...), axis, index, 1)

    Raises:
        UnsupportedError: another write is left that would be lost, as nobody takes its result, or somebody looks at
            what was written to; operator and module are named.
    """
    for buffer in [node for node in graph.nodes if node.target in EMPTY]:
        _join(buffer)
    for write in [node for node in graph.nodes if node.target is aten.scatter_.value]:
        _scatter(write)
    order = {node: number for number, node in enumerate(graph.nodes)}
    if left := next((node for node in graph.nodes if _writes(node) and _would_be_lost(node, order)), None):
        raise UnsupportedError(f"operator {name(left)} ({place(left)}) is not supported: it writes in place")


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _would_be_lost(write: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether what a converter makes of a write, a value of its own, leaves a reader behind."""
    if not write.users:
        return True
    written = args(write)[0]
    while isinstance(written, fx.Node):
        if any(order[reader] > order[write] for reader in written.users):
            return True
        written = args(written)[0] if _is_view(written) else None
    return False


def _is_view(node: fx.Node) -> bool:
    """Whether its result is its first argument's memory."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def _scatter(write: fx.Node) -> None:
    """Of a tensor that nothing has looked at before: whoever does reads the result."""
    zeros = args(write)[0]
    order = {node: number for number, node in enumerate(write.graph.nodes)}
    readers = [user for user in zeros.users if user is not write]
    if zeros.target is not aten.zeros_like.default or any(order[reader] < order[write] for reader in readers):
        return
    scattered = insert_before(write, aten.scatter.value, *args(write))
    write.replace_all_uses_with(scattered)
    for reader in readers:
        reader.replace_input_with(zeros, scattered)
    write.graph.erase_node(write)


def _join(buffer: fx.Node) -> None:
    for whole in [user for user in buffer.users if _is_whole(user)]:
        whole.replace_all_uses_with(buffer)
        buffer.graph.erase_node(whole)
    copies = {part: copy for part in buffer.users if (copy := _copy_into(part)) is not None}
    order = {node: number for number, node in enumerate(buffer.graph.nodes)}
    readers = [user for user in buffer.users if user not in copies]
    if not copies or not readers or max(order[c] for c in copies.values()) > min(order[r] for r in readers):
        return
    if not all(isinstance(_begin(part), int) for part in copies):
        return  # where a part begins depends on the number of tokens
    begins = sorted(((_begin(part), part) for part in copies), key=operator.itemgetter(0))
    axis = args(begins[0][1])[1]
    extent, filled = buffer.meta["val"].shape[axis], 0
    for begin, part in begins:
        if begin != filled or args(part)[1] != axis:
            return
        filled += part.meta["val"].shape[axis]
    if filled != extent or not all(_fits(part, copy) for part, copy in copies.items()):
        return
    sources = [_as_written(part, copies[part]) for _, part in begins]
    first = readers[0] if len(readers) == 1 else min(readers, key=order.__getitem__)
    joined = insert_before(first, aten.cat.default, sources, axis)
    joined.meta["val"] = buffer.meta["val"]
    for reader in readers:
        reader.replace_input_with(buffer, joined)
    for part, copy in copies.items():
        buffer.graph.erase_node(copy)
        buffer.graph.erase_node(part)
    buffer.graph.erase_node(buffer)


def _is_whole(part: fx.Node) -> bool:
    """True for a slice that leaves nothing out, as indexing by `[:, ...]` has it."""
    if part.target is not aten.slice.Tensor or len(args(part)) > 4:
        return False
    return _begin(part) == 0 and (*args(part)[3:4], None)[0] in (None, torch.iinfo(torch.int64).max)


def _copy_into(part: fx.Node) -> fx.Node | None:
    """The copy that writes a slice of step 1, if nothing else is done with it and the copy's result is not used."""
    users = list(part.users)
    if part.target is not aten.slice.Tensor or len(args(part)) > 4 or len(users) != 1:
        return None
    (copy,) = users
    written = copy.target is aten.copy_.default and args(copy)[0] is part and not copy.users
    return copy if written else None


def _begin(part: fx.Node) -> Any:
    return (*args(part)[2:3], 0)[0] or 0


def _fits(part: fx.Node, copy: fx.Node) -> bool:
    """Whether what is copied has the part's axes, those that it repeats along being known extents."""
    given, wanted = args(copy)[1].meta["val"].shape, part.meta["val"].shape
    return len(given) == len(wanted) and all(
        have == want or isinstance(want, int) for have, want in zip(given, wanted, strict=True)
    )


def _as_written(part: fx.Node, copy: fx.Node) -> fx.Node:
    """What a copy writes, in the buffer's dtype and the part's shape."""
    source, wanted = args(copy)[1], part.meta["val"]
    if source.meta["val"].dtype != wanted.dtype:
        source = insert_before(copy, aten.to.dtype, source, wanted.dtype)
    if source.meta["val"].shape != wanted.shape:
        given = source.meta["val"].shape
        sizes = [-1 if have == want else want for have, want in zip(given, wanted.shape, strict=True)]
        source = insert_before(copy, aten.expand.default, source, sizes)
    return source
