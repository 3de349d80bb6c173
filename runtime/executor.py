"""Runs a plan: binds its functions to memory once per batch size, then only calls kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import tvm_ffi

from vllm_compile.spec import TensorSpec

from . import vendor
from .memory import aligned, allocate
from .plan import CallStep, Function, KernelStep, Plan, VendorCall

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

    def run(self, inputs: Mapping[str, torch.Tensor], converted: Mapping[str, Any]) -> None:
        for position, name in self.late:
            self.arguments[position] = converted[name]
        self.kernel(*self.arguments)


@dataclass
class TorchCall:
    """One call of a vendor's function; `late` are the arguments that each run fills in."""

    symbol: str
    function: Callable[..., None]
    arguments: dict[str, Any]
    late: tuple[tuple[str, str], ...]

    def run(self, inputs: Mapping[str, torch.Tensor], converted: Mapping[str, Any]) -> None:
        for argument, name in self.late:
            self.arguments[argument] = inputs[name]
        self.function(**self.arguments)


@dataclass
class Observe:
    """A point between layers where an observer may look at, or overwrite, the hidden states."""

    layer: int
    hidden: torch.Tensor


@dataclass
class Bound:
    """An entry point bound to a number of tokens."""

    steps: list[BoundStep]
    result: torch.Tensor


BoundStep = Call | TorchCall | Observe


@dataclass(frozen=True)
class Batch:
    """What a step is chosen by: the number of tokens, and whether a request may have several."""

    tokens: int
    prefill: bool


class Executor:
    """Holds the kernels, the weights and the scratch memory of a plan.

    Scratch is one arena; every function has its slots in it, so calls that follow each other
    share memory and nothing is allocated while running.

    Attributes:
        max_tokens: batches up to this size need no more scratch.
        timings: seconds of each call of each kernel by symbol; None (the default) measures nothing.
    """

    def __init__(self, plan: Plan, library: str, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self._module = tvm_ffi.load_module(library)
        self._weights: dict[str, torch.Tensor] = {}
        self._bound: dict[tuple[str, Batch], Bound] = {}
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

    def prepare(self, max_tokens: int, max_rows: int = 0) -> None:
        """Allocate scratch for batches of up to `max_tokens` tokens, and results; more is allocated when needed.

        `max_rows` is how many rows of logits are asked for at most.
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
        for name, rows in (("forward", max_tokens), ("logits", max_rows)):
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
        batch = Batch(tokens, prefill)
        bound = self._bound.get((name, batch)) or self._bind_entry(name, batch)
        converted = {key: tvm_ffi.from_dlpack(tensor) for key, tensor in inputs.items()}
        with self._stream():
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

    def _stream(self) -> AbstractContextManager[Any]:
        """Kernels run on torch's current stream."""
        return nullcontext() if self.device.type == "cpu" else tvm_ffi.use_torch_stream()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _bind_entry(self, name: str, batch: Batch) -> Bound:
        tokens = batch.tokens
        if tokens > self.max_tokens:
            self.prepare(tokens)
        if len(self._bound) >= BOUND_SIZES:
            self._bound.pop(next(iter(self._bound)))
        function = self.plan.functions[name]
        (result,) = function.results
        out = self._result(name, result.spec, tokens)
        sources: dict[str, Source] = {a.buffer: Late(a.buffer) for a in function.inputs}
        sources |= {a.buffer: self._weights[a.buffer] for a in function.weights}
        steps: list[BoundStep] = []
        self._bind(function, sources | {result.buffer: out}, batch, steps)
        bound = Bound(steps, _view(out, result.spec, tokens))
        self._bound[name, batch] = bound
        return bound

    def _result(self, name: str, spec: TensorSpec, tokens: int) -> torch.Tensor:
        """Memory for the result of an entry point, grown as needed and shared by all batch sizes."""
        size = spec.nbytes(tokens)
        if name not in self._results or self._results[name].numel() < size:
            self._results[name] = allocate(size, self.device)
            self._bound = {key: bound for key, bound in self._bound.items() if key[0] != name}
        return self._results[name]

    def _bind(self, function: Function, sources: Mapping[str, Source], batch: Batch, steps: list[BoundStep]) -> None:
        slots = self._slots[function.name]
        memory = {**{b.name: slots[b.slot] for b in function.buffers}, **sources}
        for step in function.steps:
            if isinstance(step, CallStep):
                self._bind_call(step, memory, batch, steps)
            elif (large := step.large) is not None and _is_large(step, batch):
                for part in large.steps:
                    if isinstance(part, VendorCall):
                        steps.append(self._torch_call(part, memory, batch))
                    else:
                        steps.append(self._call(part, memory, batch))
            else:
                steps.append(self._call(step, memory, batch))

    def _bind_call(self, step: CallStep, memory: Mapping[str, Source], batch: Batch, steps: list[BoundStep]) -> None:
        callee = self.plan.functions[step.function]
        formal = [*callee.inputs, *callee.weights, *callee.results]
        given = [memory[name] for name in step.arguments]
        layer = sum(isinstance(known, Observe) for known in steps)
        hidden = given[0]
        if isinstance(hidden, torch.Tensor):
            steps.append(Observe(layer, _view(hidden, callee.inputs[0].spec, batch.tokens)))
        self._bind(callee, {a.buffer: m for a, m in zip(formal, given, strict=True)}, batch, steps)

    def _call(self, step: KernelStep, memory: Mapping[str, Source], batch: Batch) -> Call:
        symbol = next(symbol for minimum, symbol in reversed(step.variants) if minimum <= max(batch.tokens, 1))
        arguments: list[Any] = []
        late: list[tuple[int, str]] = []
        for position, argument in enumerate(step.arguments):
            source = memory[argument.buffer]
            if isinstance(source, Late):
                late.append((position, source.name))
                arguments.append(None)
            else:
                arguments.append(tvm_ffi.from_dlpack(_view(source, argument.spec, batch.tokens)))
        return Call(symbol, self._module[symbol], arguments, tuple(late))

    def _torch_call(self, call: VendorCall, memory: Mapping[str, Source], batch: Batch) -> TorchCall:
        arguments: dict[str, Any] = dict(call.attributes)
        late: list[tuple[str, str]] = []
        for name, argument in call.arguments:
            source = memory[argument.buffer]
            if isinstance(source, Late):
                late.append((name, source.name))
            else:
                arguments[name] = _view(source, argument.spec, batch.tokens)
        return TorchCall(call.function, vendor.FUNCTIONS[call.function], arguments, tuple(late))


def _is_large(step: KernelStep, batch: Batch) -> bool:
    """True if `step.large` is to run instead of the step's kernel."""
    large = step.large
    if large is None or batch.tokens < large.min_tokens or (large.prefill and not batch.prefill):
        return False
    return all(vendor.available(part.function) for part in large.steps if isinstance(part, VendorCall))


def _view(memory: torch.Tensor, spec: TensorSpec, tokens: int) -> torch.Tensor:
    """The start of `memory` (uint8, or a weight as it is) as a tensor of `spec`."""
    if memory.dtype != torch.uint8:
        return memory
    return memory[: spec.nbytes(tokens)].view(getattr(torch, spec.dtype)).view(spec.sizes(tokens))
