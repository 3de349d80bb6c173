"""Runs a plan: binds its functions to memory once per batch size, then only calls kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tvm_ffi

from vllm_compile.spec import TensorSpec

from .bind import Batch, Binder, Bound, Kernel, Observe, Weight
from .memory import aligned, allocate
from .plan import Plan

# Batches whose bindings are kept, those used last: what graphs are captured of, and the mixed steps of a loaded server,
# whose numbers of tokens recur.  Of Llama-3.1-8B's plan for an H200 one is 260 calls: about 0.1 MB of the host's
# memory, and 1.5 ms to make (on an AMD EPYC, kernels left out).
BOUND_BATCHES = 512


def load_kernels(library: Path) -> Callable[[str], Kernel]:
    """The kernels of a library, by symbol."""
    return tvm_ffi.load_module(str(library)).__getitem__


def torch_stream(device: torch.device) -> AbstractContextManager[Any]:
    """While it is open, kernels run on torch's current stream."""
    if device.type == "cpu":
        return nullcontext()
    # Not use_torch_stream, which for a HIP device would set the stream of the CUDA device of the same number.
    stream = torch.cuda.current_stream(device)
    kind = "cuda" if torch.version.hip is None else "rocm"
    return tvm_ffi.use_raw_stream(tvm_ffi.device(kind, stream.device_index), stream.cuda_stream)


class Executor:
    """Holds the kernels, the weights and the scratch memory of a plan.

    Scratch is one arena; every function has its slots in it, so calls that follow each other
    share memory and nothing is allocated while running.

    Args:
        plan: what to run.
        kernel: gives the kernel of a symbol.
        device: where.

    Attributes:
        max_tokens: batches up to this size need no more scratch.
        timings: seconds of each call of each kernel by symbol; None (the default) measures nothing.
    """

    def __init__(self, plan: Plan, kernel: Callable[[str], Kernel], device: torch.device) -> None:
        self.plan, self.device = plan, device
        self._kernel = cache(kernel)
        self._weights: dict[str, Weight] = {}
        self._bound: dict[tuple[str, Batch], Bound] = {}
        self._slots: dict[str, list[torch.Tensor]] = {}
        self._results: dict[str, torch.Tensor] = {}
        self.max_tokens = 0
        self.timings: dict[str, list[float]] | None = None

    def set_plan(self, plan: Plan) -> None:
        """Run this plan from now on, which differs from the one before in its kernels only."""
        self.plan = plan
        self._bound.clear()

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors as weights, by the names the plan gives them."""
        self._weights = {name: Weight(tensor, tvm_ffi.from_dlpack(tensor)) for name, tensor in weights.items()}
        self._bound.clear()

    def weight(self, name: str) -> torch.Tensor:
        """The weight the plan calls `name`."""
        return self._weights[name].tensor

    def prepare(self, max_tokens: int, max_rows: int = 0) -> None:
        """Allocate scratch for batches of up to `max_tokens` tokens, and results; more is allocated when needed.

        `max_rows` is how many rows of logits, and most probable tokens, are asked for at most.
        """
        self.max_tokens = max_tokens
        self._bound.clear()
        sizes = {
            name: [aligned(size * max_tokens) for size in function.slot_bytes_per_token()]
            for name, function in self.plan.functions.items()
        }
        arena, offset = allocate(sum(map(sum, sizes.values())), self.device), 0
        for name, slots in sizes.items():
            self._slots[name] = []
            for size in slots:
                self._slots[name].append(arena[offset : offset + size])
                offset += size
        self._results.clear()
        for name, rows in (("forward", max_tokens), ("logits", max_rows), ("greedy", max_rows)):
            if name in self.plan.functions:
                self._result(name, self.plan.functions[name].results[0].spec, rows)

    def run(
        self,
        name: str,
        tokens: int,
        inputs: Mapping[str, torch.Tensor],
        observer: Callable[[int, torch.Tensor], None] | None = None,
        prefill: bool = False,
    ) -> torch.Tensor:
        """Run entry point `name` on `tokens` tokens; the result is valid until the next run.

        `prefill` says that a request may have several of them.
        """
        bound = self._bound_for(name, Batch(tokens, prefill))
        converted = {key: tvm_ffi.from_dlpack(tensor) for key, tensor in inputs.items()}
        with torch_stream(self.device):
            for step in bound.steps:
                if isinstance(step, Observe):
                    if observer is not None:
                        observer(step.layer, step.hidden)
                elif self.timings is None:
                    step.run(inputs, converted)
                else:
                    began = self._now()
                    step.run(inputs, converted)
                    self.timings.setdefault(step.symbol, []).append(self._now() - began)
        return bound.result

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _bound_for(self, name: str, batch: Batch) -> Bound:
        """The entry point bound for a batch, made where the batches used last have not had it."""
        bound = self._bound.pop((name, batch), None) or self._bind(name, batch)
        self._bound[name, batch] = bound  # behind all others
        if len(self._bound) > BOUND_BATCHES:
            self._bound.pop(next(iter(self._bound)))
        return bound

    def _bind(self, name: str, batch: Batch) -> Bound:
        if batch.tokens > self.max_tokens:
            self.prepare(batch.tokens)
        function = self.plan.functions[name]
        out = self._result(name, function.results[0].spec, batch.tokens)
        return Binder(self.plan, self._kernel, self._slots, batch).bind(function, self._weights, out)

    def _result(self, name: str, spec: TensorSpec, tokens: int) -> torch.Tensor:
        """Memory for the result of an entry point, grown as needed and shared by all batch sizes."""
        size = spec.nbytes(tokens)
        if name not in self._results or self._results[name].numel() < size:
            self._results[name] = allocate(size, self.device)
            self._bound = {key: bound for key, bound in self._bound.items() if key[0] != name}
        return self._results[name]
