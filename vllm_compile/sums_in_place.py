"""Products that are added to what nobody reads afterwards: in place, as vendors' libraries do it best.

torch's `addmm` copies the residual to the result first, unless they are one tensor: 2 * T * N * 2 bytes that are read
and written for nothing, 2.2 us a layer of Llama-3.1-8B on an H200 for 256 tokens, 50 for 12,288
(benchmarks/baseline.md).  Our own kernels read
each residual in the thread that writes the sum in its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar

from .runtime.plan import Argument, CallStep, KernelStep, TorchStep, VendorCall
from .slots import buffers_of

Step: TypeAlias = KernelStep | TorchStep | CallStep
Kernel = TypeVar("Kernel", bound=KernelStep | VendorCall)


def add_in_place(scratch: Collection[str], steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps, with residuals that lie where their sums will.

    Args:
        scratch: the function's own buffers: those that it is given may be read by its caller.
        steps: of one function; a residual is renamed to its sum from its first step on.
    """
    changed = list(steps)
    for index in range(len(changed)):
        for residual, total in _sums(changed[index]):
            unread = all(residual not in buffers_of(later) for later in changed[index + 1 :])
            unwritten = all(total not in buffers_of(earlier) for earlier in changed[:index])
            if residual in scratch and unread and unwritten:
                changed[: index + 1] = [_renamed(known, residual, total) for known in changed[: index + 1]]
    return tuple(changed)


def _sums(step: Step) -> list[tuple[str, str]]:
    """(residual, result) of a step's vendor product, where that adds nothing else, and the residual is nothing else."""
    parts = step.large.steps if isinstance(step, KernelStep) and step.large is not None else ()
    products = [dict(part.arguments) for part in parts if isinstance(part, VendorCall) and part.function == "linear"]
    sums = [(p["residual"].buffer, p["out"].buffer) for p in products if "residual" in p and "bias" not in p]
    uses = Counter(buffers_of(step))
    return [(residual, total) for residual, total in sums if uses[residual] == uses[total]]


def _renamed(step: Step, old: str, new: str) -> Step:
    if isinstance(step, CallStep):
        return replace(step, arguments=tuple(new if name == old else name for name in step.arguments))
    if isinstance(step, TorchStep):
        raise TypeError(f"{step.function} is a step of a torch program, which has no vendor products")
    return _with_buffer(step, old, new)


def _with_buffer(step: Kernel, old: str, new: str) -> Kernel:
    def argument(known: Argument) -> Argument:
        return replace(known, buffer=new) if known.buffer == old else known

    if isinstance(step, VendorCall):
        return replace(step, arguments=tuple((name, argument(known)) for name, known in step.arguments))
    large = step.large
    if large is not None:
        large = replace(large, steps=tuple(_with_buffer(part, old, new) for part in large.steps))
    return replace(step, arguments=tuple(map(argument, step.arguments)), large=large)
