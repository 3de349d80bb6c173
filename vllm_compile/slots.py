"""Slots of scratch memory: buffers of a function that are not alive together share one."""

from __future__ import annotations

from collections.abc import Sequence

from .runtime.plan import Buffer, CallStep, KernelStep, TorchStep, VendorCall
from .spec import TensorSpec


def assign_slots(
    scratch: dict[str, TensorSpec], steps: Sequence[KernelStep | TorchStep | CallStep]
) -> tuple[Buffer, ...]:
    """Give each scratch buffer a slot that no buffer alive at the same time holds (a linear scan)."""
    used = [buffers_of(step) for step in steps]
    last = {name: index for index, names in enumerate(used) for name in names}
    live: dict[str, int] = {}
    buffers = []
    for index, names in enumerate(used):
        for name in names:
            if name in scratch and name not in live:
                live[name] = next(i for i in range(len(live) + 1) if i not in live.values())
                buffers.append(Buffer(name, scratch[name], live[name]))
        live = {name: slot for name, slot in live.items() if last[name] > index}
    return tuple(buffers)


def buffers_of(step: KernelStep | TorchStep | CallStep | VendorCall) -> list[str]:
    """Names of what a step reads or writes, either way that it may be done."""
    if isinstance(step, CallStep):
        return list(step.arguments)
    if isinstance(step, VendorCall):
        return [argument.buffer for _, argument in step.arguments]
    if isinstance(step, TorchStep):
        return [*(argument.buffer for _, argument in step.inputs), *(result.buffer for result in step.results)]
    large = step.large.steps if step.large is not None else ()
    return [*(argument.buffer for argument in step.arguments), *(name for s in large for name in buffers_of(s))]
