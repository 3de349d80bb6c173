"""A compiled program whose layers share the memory of one layer's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from . import lossless
from .runtime.executor import Executor, load_kernels
from .runtime.manifest import LIBRARY
from .runtime.plan import CallStep, Plan
from .runtime.torch_executor import TorchExecutor

ENTRIES = ("forward", "logits")


class StreamedProgram:
    """Runs a plan like `Program`, reading each layer's weights just before the layer runs.

    `timings` collects the seconds of each kernel call by symbol.
    """

    def __init__(self, directory: Path, plan: Plan, device: torch.device) -> None:
        self.timings: dict[str, list[float]] = {}
        self._device, self._plan = device, plan
        self._executor = (
            TorchExecutor(plan, device)
            if plan.runs_in_torch
            else Executor(plan, load_kernels(directory / LIBRARY), device)
        )
        self._shard_of: dict[str, Path] = {}
        for shard in sorted(directory.glob("model-*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                self._shard_of.update(dict.fromkeys(file.keys(), shard))
        self._layers, self._shared = _layer_weights(plan, device)
        self._shapes = {a.buffer: a.spec.sizes() for name in ENTRIES for a in plan.functions[name].weights}
        own = {name: self._read(name) for name in self._shapes if name not in self._shared}
        self._executor.set_weights({**own, **self._shared})
        self._executor.timings = self.timings

    def forward(
        self,
        input_ids: torch.Tensor,
        kv: list[torch.Tensor],
        metadata: Mapping[str, torch.Tensor],
        observer: Callable[[int, torch.Tensor], None] = lambda layer, hidden: None,
    ) -> torch.Tensor:
        """See `Program.forward`; `metadata` holds its other arguments by name."""

        def load(layer: int, hidden: torch.Tensor) -> None:
            for name in self._layers[layer]:
                self._shared[name].copy_(self._read(name))
            observer(layer, hidden)

        inputs: dict[str, Any] = {"input_ids": input_ids, **metadata}
        inputs |= {f"kv_{layer}": cache for layer, cache in enumerate(kv)}
        tokens = input_ids.shape[0]
        return self._executor.run("forward", tokens, inputs, load, prefill=tokens != len(metadata["seq_lens"]))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Program.logits`."""
        return self._executor.run("logits", hidden.shape[0], {"hidden": hidden})

    def greedy(self, logits: torch.Tensor) -> torch.Tensor | None:
        """See `Program.greedy`; None if the plan does not say how."""
        if "greedy" not in self._plan.functions:
            return None
        return self._executor.run("greedy", logits.shape[0], {"logits": logits})

    def _read(self, name: str) -> torch.Tensor:
        if name in self._plan.restored:
            return lossless.unpack(self._read(self._plan.restored[name]), *self._shapes[name])
        with safe_open(self._shard_of[name], framework="pt") as file:
            return file.get_tensor(name).to(self._device)


def _layer_weights(plan: Plan, device: torch.device) -> tuple[list[list[str]], dict[str, torch.Tensor]]:
    """The stored weights of each layer, and for each of them memory that the layers share."""
    layers: list[list[str]] = []
    memory: dict[tuple[str, str], torch.Tensor] = {}
    shared: dict[str, torch.Tensor] = {}
    for step in plan.functions["forward"].steps:
        if isinstance(step, CallStep):
            callee = plan.functions[step.function]
            names = step.arguments[len(callee.inputs) : len(callee.inputs) + len(callee.weights)]
            for name, formal in zip(names, callee.weights, strict=True):
                key = (step.function, formal.buffer)
                if key not in memory:
                    dtype = getattr(torch, formal.spec.dtype)
                    memory[key] = torch.empty(formal.spec.sizes(), dtype=dtype, device=device)
                shared[name] = memory[key]
            layers.append(list(names))
    return layers, shared
