"""Binds a plan to memory for one number of tokens: what is left to do in a step is to call kernels.

A step whose number of tokens is new waits for it (requests that join while others decode make such steps), so
binding has to be cheap: layers share their scratch, hence each view of it is made once and used by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tvm_ffi

from vllm_compile.spec import TensorSpec

from . import vendor
from .plan import CallStep, Function, KernelStep, Plan, TorchStep, VendorCall

Kernel = Callable[..., None]


@dataclass(frozen=True)
class Late:
    """An argument of the entry point, known only when it is called."""

    name: str


@dataclass(frozen=True)
class Weight:
    """A weight: as torch has it, and as kernels take it."""

    tensor: torch.Tensor
    converted: Any


Source = torch.Tensor | Weight | Late  # a tensor is scratch: uint8, at least as long as the buffer


@dataclass
class Call:
    """One kernel call; `late` are the positions that each run fills in."""

    symbol: str
    kernel: Kernel
    arguments: list[Any]
    late: tuple[tuple[int, str], ...]

    def run(self, inputs: Mapping[str, torch.Tensor], converted: Mapping[str, Any]) -> None:
        for position, name in self.late:
            self.arguments[position] = converted[name]
        self.kernel(*self.arguments)
        for position, _ in self.late:  # a binding is kept, what it was run on is not
            self.arguments[position] = None


@dataclass
class TorchCall:
    """One call of a vendor's function; `late` are the arguments that each run fills in."""

    symbol: str
    function: Kernel
    arguments: dict[str, Any]
    late: tuple[tuple[str, str], ...]

    def run(self, inputs: Mapping[str, torch.Tensor], converted: Mapping[str, Any]) -> None:
        self.function(**self.arguments, **{argument: inputs[name] for argument, name in self.late})


@dataclass
class Observe:
    """A point between layers where an observer may look at, or overwrite, the hidden states."""

    layer: int
    hidden: torch.Tensor


BoundStep = Call | TorchCall | Observe


@dataclass
class Bound:
    """An entry point bound to a number of tokens."""

    steps: list[BoundStep]
    result: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """What a step is chosen by: the number of tokens, and whether a request may have several."""

    tokens: int
    prefill: bool


class Binder:
    """Binds entry points for one batch.

    Args:
        plan: the plan.
        kernel: gives the kernel of a symbol.
        slots: scratch memory of each function, uint8.
        batch: what to bind for.
    """

    def __init__(
        self,
        plan: Plan,
        kernel: Callable[[str], Kernel],
        slots: Mapping[str, Sequence[torch.Tensor]],
        batch: Batch,
    ) -> None:
        self._plan, self._kernel, self._slots, self._batch = plan, kernel, slots, batch
        self._views: dict[tuple[int, TensorSpec], torch.Tensor] = {}
        self._converted: dict[tuple[int, TensorSpec], Any] = {}

    def bind(self, function: Function, weights: Mapping[str, Weight], out: torch.Tensor) -> Bound:
        """Bind an entry point whose one result is written to `out` (uint8)."""
        self._steps: list[BoundStep] = []
        (result,) = function.results
        sources: dict[str, Source] = {a.buffer: Late(a.buffer) for a in function.inputs}
        sources |= {a.buffer: weights[a.buffer] for a in function.weights}
        self._function(function, sources | {result.buffer: out})
        return Bound(self._steps, self._view(out, result.spec))

    def _function(self, function: Function, sources: Mapping[str, Source]) -> None:
        slots = self._slots[function.name]
        memory = {**{b.name: slots[b.slot] for b in function.buffers}, **sources}
        for step in function.steps:
            if isinstance(step, CallStep):
                self._layer(step, memory)
            elif isinstance(step, TorchStep):
                raise TypeError(f"{step.function} is a step of a torch program, which has an executor of its own")
            elif (large := step.large) is not None and _is_large(step, self._batch):
                self._steps += [self._step(part, memory) for part in large.steps]
            else:
                self._steps.append(self._call(step, memory))

    def _layer(self, step: CallStep, memory: Mapping[str, Source]) -> None:
        callee = self._plan.functions[step.function]
        formal = [*callee.inputs, *callee.weights, *callee.results]
        given = [memory[name] for name in step.arguments]
        layer = sum(isinstance(known, Observe) for known in self._steps)
        hidden = given[0]
        if isinstance(hidden, torch.Tensor):
            self._steps.append(Observe(layer, self._view(hidden, callee.inputs[0].spec)))
        self._function(callee, {a.buffer: m for a, m in zip(formal, given, strict=True)})

    def _step(self, step: KernelStep | VendorCall, memory: Mapping[str, Source]) -> BoundStep:
        return self._call(step, memory) if isinstance(step, KernelStep) else self._torch_call(step, memory)

    def _call(self, step: KernelStep, memory: Mapping[str, Source]) -> Call:
        tokens = max(self._batch.tokens, 1)
        symbol = next(symbol for minimum, symbol in reversed(step.variants) if minimum <= tokens)
        arguments: list[Any] = []
        late: list[tuple[int, str]] = []
        for position, argument in enumerate(step.arguments):
            source = memory[argument.buffer]
            if isinstance(source, Late):
                late.append((position, source.name))
                arguments.append(None)
            elif isinstance(source, Weight):
                arguments.append(source.converted)
            else:
                arguments.append(self._convert(source, argument.spec))
        return Call(symbol, self._kernel(symbol), arguments, tuple(late))

    def _torch_call(self, call: VendorCall, memory: Mapping[str, Source]) -> TorchCall:
        arguments: dict[str, Any] = dict(call.attributes)
        late: list[tuple[str, str]] = []
        for name, argument in call.arguments:
            source = memory[argument.buffer]
            if isinstance(source, Late):
                late.append((name, source.name))
            elif isinstance(source, Weight):
                arguments[name] = source.tensor
            else:
                arguments[name] = self._view(source, argument.spec)
        return TorchCall(call.function, vendor.FUNCTIONS[call.function], arguments, tuple(late))

    def _view(self, memory: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        """The start of `memory` as a tensor of `spec`."""
        key = memory.data_ptr(), spec
        if key not in self._views:
            tokens = self._batch.tokens
            flat = memory[: spec.nbytes(tokens)].view(getattr(torch, spec.dtype))
            self._views[key] = flat.view(spec.sizes(tokens))
        return self._views[key]

    def _convert(self, memory: torch.Tensor, spec: TensorSpec) -> Any:
        """The same, as kernels take it."""
        key = memory.data_ptr(), spec
        if key not in self._converted:
            self._converted[key] = tvm_ffi.from_dlpack(self._view(memory, spec))
        return self._converted[key]


def _is_large(step: KernelStep, batch: Batch) -> bool:
    """True if `step.large` is to run instead of the step's kernel."""
    large = step.large
    if large is None or batch.tokens < large.min_tokens or (large.prefill and not batch.prefill):
        return False
    return all(vendor.available(part.function) for part in large.steps if isinstance(part, VendorCall))
