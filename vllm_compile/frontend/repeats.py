"""Layers that compute the same are traced once, so that tracing does not grow with a model's depth.

torch.export takes 0.2 s for each decoder layer.  Running one on meta tensors takes a hundredth of that, and shows each
operator that it calls: layers whose operators, constants and data flow are equal are one function of their input and
their weights, whatever Python made of their number.  The first of each kind is traced; the others are one placeholder
operator each, and copies of the first one's nodes afterwards, so that the graph is what it would have been.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from . import torch_ops  # noqa: F401  (defines the operators below)

ATTENTION = torch.ops.vllm_compile.causal_attention.default
BOUNDARY = torch.ops.vllm_compile.layer_boundary.default
REPEAT = torch.ops.vllm_compile.layer_repeat.default
LAYER_ARGUMENT = 3  # of causal_attention: the layer's number, which says whose KV cache it uses


@dataclass
class _Recording:
    """What one layer computes: equal for two layers that differ in their weights alone.

    `names` gives each tensor the layer has met a name that does not depend on the layer's number.
    """

    index: int
    names: dict[int, tuple[Any, ...]]
    calls: list[Any] = field(default_factory=list)
    direct: bool = False  # what it returns is the next layer's input


class _Recorder(TorchDispatchMode):
    """Records the operators that each layer calls while the model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.recordings: list[_Recording] = []
        self._current: _Recording | None = None
        self._alive: list[Any] = []  # tensors are told apart by their ids
        self._result: Any = None

    def start(self, index: int, layer: nn.Module, x: torch.Tensor) -> None:
        names: dict[int, tuple[Any, ...]] = {id(x): ("x",)}
        names |= {id(p): ("weight", number) for number, p in enumerate(layer.parameters())}
        self._current = _Recording(index, names)

    def stop(self, result: Any) -> None:
        assert self._current is not None
        self._current.calls.append(self._described(self._current, result))
        self.recordings.append(self._current)
        self._current, self._result = None, result

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is BOUNDARY and self.recordings and args[0] is self._result:
            self.recordings[-1].direct = True
        if (layer := self._current) is not None:
            if function is ATTENTION and args[LAYER_ARGUMENT] == layer.index:
                args = (*args[:LAYER_ARGUMENT], "own", *args[LAYER_ARGUMENT + 1 :])
            layer.calls.append((function, self._described(layer, (args, kwargs or {}))))
            made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            layer.names |= {id(tensor): ("made", len(layer.calls), number) for number, tensor in enumerate(made)}
            self._alive.append((args, kwargs, out))
        return out

    @staticmethod
    def _described(layer: _Recording, value: Any) -> Any:
        leaves, structure = tree_flatten(value)
        return structure, [_leaf(layer, leaf) for leaf in leaves]


def _leaf(layer: _Recording, leaf: Any) -> Any:
    """A tensor by its name in the layer, or as the one that it is; a constant with its type (1 is not 1.0)."""
    if isinstance(leaf, torch.Tensor):
        return layer.names.get(id(leaf), ("outer", id(leaf)))
    return type(leaf), leaf


def find_repeats(layers: nn.ModuleList, run: Callable[[], Any]) -> dict[int, int]:
    """The number of each layer that computes what an earlier one does, and that one's number.

    `run` runs the model, whose layers are marked (see `mark_layers`), on meta tensors.  If it cannot (it asks for a
    tensor's value where torch.export would not), no layer is known to repeat another.
    """
    recorder = _Recorder()
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(_forward_of(layer, _watched(recorder, index, layer)))
        try:
            with recorder, torch.no_grad():
                run()
        except Exception:  # models raise whatever they do; torch.export says why, if it cannot either
            return {}
    kinds: list[_Recording] = []
    repeats: dict[int, int] = {}
    for recording in recorder.recordings:
        first = next((kind for kind in kinds if recording.direct and kind.calls == recording.calls), None)
        if first is not None:
            repeats[recording.index] = first.index
        elif recording.direct:
            kinds.append(recording)
    return repeats


@contextmanager
def without_repeats(layers: nn.ModuleList, repeats: Mapping[int, int]) -> Iterator[None]:
    """Within it, each layer that repeats another is one operator."""
    with ExitStack() as stack:
        for index, first in repeats.items():

            def forward(*args, index=index, first=first, **kwargs):
                return REPEAT(_input(args, kwargs), index, first)

            stack.enter_context(_forward_of(layers[index], forward))
        yield


def expand_repeats(program: torch.export.ExportedProgram, layers: nn.ModuleList, parameters: Mapping[str, Any]) -> None:
    """Put, in place, the nodes of the layer repeated in the place of each `layer_repeat`.

    `parameters` are the traced module's by their names in `program`, tied ones under each.
    """
    graph = program.graph
    nodes = list(graph.nodes)
    placeholders = {node.name: node for node in nodes if node.op == "placeholder"}
    holders = {
        id(parameters[spec.target]): placeholders[spec.arg.name]
        for spec in program.graph_signature.input_specs
        if spec.target in parameters
    }
    position = {node: number for number, node in enumerate(nodes)}
    boundaries = {node.args[1]: node for node in nodes if node.target is BOUNDARY}
    for repeat in [node for node in nodes if node.target is REPEAT]:
        x, index, first = repeat.args
        begin, end = boundaries[first], boundaries[first + 1]
        copies: dict[fx.Node, fx.Node] = {begin: x}
        for theirs, ours in zip(layers[first].parameters(), layers[index].parameters(), strict=True):
            copies[holders[id(theirs)]] = holders[id(ours)]
        with graph.inserting_before(repeat):
            for node in nodes[position[begin] + 1 : position[end]]:
                copies[node] = graph.node_copy(node, lambda node, copies=copies: copies.get(node, node))
                if node.target is ATTENTION:
                    copies[node].update_arg(LAYER_ARGUMENT, index)
        repeat.replace_all_uses_with(copies[end.args[0]])
        graph.erase_node(repeat)


def _watched(recorder: _Recorder, index: int, layer: nn.Module) -> Callable[..., Any]:
    inner = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        recorder.start(index, layer, _input(args, kwargs))
        result = inner(*args, **kwargs)
        recorder.stop(result)
        return result

    return forward


def _input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def _forward_of(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give one layer another `forward` for a while."""
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
