"""Which kernels run a call, and what they cost together: ours as they are compiled, or a library's on plain weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vllm_compile.errors import UnsupportedError
from vllm_compile.fused_calls import parts
from vllm_compile.schedules.family import TorchCall
from vllm_compile.schedules.select import Choice, choose
from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from .cost import Cost, Workload, gated_parts, rows_of, step_cost
from .graph import Call


@dataclass(frozen=True)
class Kernel:
    """A kernel that runs a call or a part of it: ours, or a library's.

    `launches` is more than one where several kernels share the cost.
    """

    cost: Cost
    library: bool = False
    launches: int = 1


Execution = Callable[[Call, Workload], tuple[Kernel, ...]]


class Chooser:
    """The kernels that `compile` chooses for a target, each call's once.

    Attributes:
        refused: why compiling would be refused: a line for each call without a kernel.
    """

    def __init__(self, target: Target, lossless: bool = True) -> None:
        self._target, self._lossless = target, lossless
        self._choices: dict[OpSpec, Choice | None] = {}
        self.refused: list[str] = []

    def choice(self, spec: OpSpec) -> Choice | None:
        """None if the target has no kernel for the call."""
        if spec not in self._choices:
            try:
                self._choices[spec] = choose(spec, self._target, self._lossless)
            except UnsupportedError as error:
                self._choices[spec] = None
                self.refused.append(str(error))
        return self._choices[spec]

    def compiled(self, call: Call, workload: Workload) -> tuple[Kernel, ...]:
        """Ours, with weights as they are stored; in large batches what takes over, mostly a library."""
        choice = self.choice(call.spec)
        if choice is None:
            return plain(call, workload)
        if choice.calls:
            return in_torch(call, workload, choice.calls)
        vendor = choice.vendor
        prefill = workload.queries > 1
        rows = rows_of(call, workload)
        if vendor is None or rows < vendor.min_tokens or (vendor.prefill and not prefill):
            variant = [v for v in choice.variants if v.min_tokens <= max(rows, 1)][-1]
            launches = choice.family.launches(call.spec, variant.config, rows, self._target)
            return (Kernel(step_cost(call, workload, choice.layouts), launches=launches),)
        theirs = isinstance(vendor.function, str)
        if vendor.prologue is not None:
            first, rest = (replace(call, spec=part) for part in (vendor.prologue.call, vendor.prologue.rest))
            return (Kernel(step_cost(first, workload)), Kernel(step_cost(rest, workload), theirs))
        if vendor.epilogue is None:
            return (Kernel(step_cost(call, workload), theirs),)
        product, gate = gated_parts(call, workload)
        return (Kernel(product, theirs), Kernel(gate))


def in_torch(call: Call, workload: Workload, parts: Sequence[TorchCall]) -> tuple[Kernel, ...]:
    """A call as functions of torch: products are a library's kernels, fused parts are ours."""
    if call.op == "gate_up_silu":
        product, gate = gated_parts(call, workload)
        return (Kernel(product, library=True), Kernel(gate))
    ours = any(part.kernel for part in parts)
    return (Kernel(step_cost(call, workload), library=not ours, launches=len(parts)),)


def plain(call: Call, workload: Workload) -> tuple[Kernel, ...]:
    """One kernel of ours, weights plain."""
    return (Kernel(step_cost(call, workload)),)


def library(call: Call, workload: Workload) -> tuple[Kernel, ...]:
    """A library's kernels, weights plain: cuBLAS, FlashAttention, and what torch compiles between them.

    Rotation and cache write are two; a product and its gate too.
    """
    if call.op == "gate_up_silu":
        product, gate = gated_parts(call, workload)
        return (Kernel(product, library=True), Kernel(gate, library=True))
    if call.op == "qkv_rope_attention":
        return tuple(kernel for part in parts(call.spec) for kernel in library(replace(call, spec=part), workload))
    return (Kernel(step_cost(call, workload), library=True, launches=2 if call.op == "qkv_rope_cache" else 1),)
