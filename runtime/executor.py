"""Runs a plan: binds its functions to memory once per batch size, then only calls kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import tvm_ffi

from vllm_compile.spec import TensorSpec

from .memory import aligned, allocate
from .plan import CallStep, Function, KernelStep, Plan

BOUND_SIZES = 64  # numbers of tokens whose bindings are kept


@dataclass(frozen=True)
class Late:
    """An argument of the entry point, known only when it is called."""

    name: str


Source = torch.Tensor | Late


@dataclass
class Call:
    """One kernel call; `late` are the positions that each run fills in."""

    symbol: str
    kernel: Callable[..., None]
    arguments: list[Any]
    late: tuple[tuple[int, str], ...]


@dataclass
class Observe:
    """A point between layers where an observer may look at, or overwrite, the hidden states."""

    layer: int
    hidden: torch.Tensor


@dataclass
class Bound:
    """An entry point bound to a number of tokens."""

    steps: list[Call | Observe]
    result: torch.Tensor


class Executor:
    """Holds the kernels, the weights and the scratch memory of a plan.

    Scratch is one arena; every function has its slots in it, so calls that follow each other
    share memory and nothing is allocated while running.

    Attributes:
        max_tokens: batches up to this size need no more scratch.
        timings: seconds of each call of each kernel by symbol; None (the default) measures nothing.
    """

    def __init__(self, plan: Plan, library: str) -> None:
        self.plan = plan
        self._module = tvm_ffi.load_module(library)
        self._weights: dict[str, torch.Tensor] = {}
        self._bound: dict[tuple[str, int], Bound] = {}
        self._slots: dict[str, list[torch.Tensor]] = {}
        self._results: dict[str, torch.Tensor] = {}
        self.max_tokens = 0
        self.timings: dict[str, list[float]] | None = None

    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Use these tensors as weights, by the names the plan gives them."""
        self._weights = dict(weights)
        self._bound.clear()

    def weight(self, name: str) -> torch.Tensor:
        """The weight the plan calls `name`."""
        return self._weights[name]

    def prepare(self, max_tokens: int) -> None:
        """Allocate scratch for batches of up to `max_tokens` tokens; more is allocated when needed."""
        self.max_tokens = max_tokens
        self._bound.clear()
        sizes = {
            name: [aligned(size * max_tokens) for size in function.slot_bytes_per_token()]
            for name, function in self.plan.functions.items()
        }
        arena, offset = allocate(sum(map(sum, sizes.values()))), 0
        for name, slots in sizes.items():
            self._slots[name] = []
            for size in slots:
                self._slots[name].append(arena[offset : offset + size])
                offset += size
        self._results.clear()

    def run(
        self,
        name: str,
        tokens: int,
        inputs: Mapping[str, torch.Tensor],
        observer: Callable[[int, torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """Run entry point `name` on `tokens` tokens; the result is valid until the next run."""
        bound = self._bound.get((name, tokens)) or self._bind_entry(name, tokens)
        timings = self.timings
        late = {key: tvm_ffi.from_dlpack(tensor) for key, tensor in inputs.items()}
        for step in bound.steps:
            if isinstance(step, Observe):
                if observer is not None:
                    observer(step.layer, step.hidden)
                continue
            for position, key in step.late:
                step.arguments[position] = late[key]
            if timings is None:
                step.kernel(*step.arguments)
            else:
                began = time.perf_counter()
                step.kernel(*step.arguments)
                timings.setdefault(step.symbol, []).append(time.perf_counter() - began)
        return bound.result

    def _bind_entry(self, name: str, tokens: int) -> Bound:
        if tokens > self.max_tokens:
            self.prepare(tokens)
        if len(self._bound) >= BOUND_SIZES:
            self._bound.pop(next(iter(self._bound)))
        function = self.plan.functions[name]
        (result,) = function.results
        out = self._result(name, result.spec, tokens)
        sources: dict[str, Source] = {a.buffer: Late(a.buffer) for a in function.inputs}
        sources |= {a.buffer: self._weights[a.buffer] for a in function.weights}
        steps: list[Call | Observe] = []
        self._bind(function, sources | {result.buffer: out}, tokens, steps)
        bound = Bound(steps, _view(out, result.spec, tokens))
        self._bound[name, tokens] = bound
        return bound

    def _result(self, name: str, spec: TensorSpec, tokens: int) -> torch.Tensor:
        """Memory for the result of an entry point, grown as needed and shared by all batch sizes."""
        size = spec.nbytes(tokens)
        if name not in self._results or self._results[name].numel() < size:
            self._results[name] = allocate(size)
            self._bound = {key: bound for key, bound in self._bound.items() if key[0] != name}
        return self._results[name]

    def _bind(
        self, function: Function, sources: Mapping[str, Source], tokens: int, steps: list[Call | Observe]
    ) -> None:
        slots = self._slots[function.name]
        memory = {**{b.name: slots[b.slot] for b in function.buffers}, **sources}
        for step in function.steps:
            if isinstance(step, KernelStep):
                steps.append(self._call(step, memory, tokens))
            else:
                self._bind_call(step, memory, tokens, steps)

    def _bind_call(
        self, step: CallStep, memory: Mapping[str, Source], tokens: int, steps: list[Call | Observe]
    ) -> None:
        callee = self.plan.functions[step.function]
        formal = [*callee.inputs, *callee.weights, *callee.results]
        given = [memory[name] for name in step.arguments]
        layer = sum(isinstance(known, Observe) for known in steps)
        hidden = given[0]
        if isinstance(hidden, torch.Tensor):
            steps.append(Observe(layer, _view(hidden, callee.inputs[0].spec, tokens)))
        self._bind(callee, {a.buffer: m for a, m in zip(formal, given, strict=True)}, tokens, steps)

    def _call(self, step: KernelStep, memory: Mapping[str, Source], tokens: int) -> Call:
        symbol = next(symbol for minimum, symbol in reversed(step.variants) if minimum <= max(tokens, 1))
        arguments: list[Any] = []
        late: list[tuple[int, str]] = []
        for position, argument in enumerate(step.arguments):
            source = memory[argument.buffer]
            if isinstance(source, Late):
                late.append((position, source.name))
                arguments.append(None)
            else:
                arguments.append(tvm_ffi.from_dlpack(_view(source, argument.spec, tokens)))
        return Call(symbol, self._module[symbol], arguments, tuple(late))


def _view(memory: torch.Tensor, spec: TensorSpec, tokens: int) -> torch.Tensor:
    """The start of `memory` (uint8, or a weight as it is) as a tensor of `spec`."""
    if memory.dtype != torch.uint8:
        return memory
    return memory[: spec.nbytes(tokens)].view(getattr(torch, spec.dtype)).view(spec.sizes(tokens))
