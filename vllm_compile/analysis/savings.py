"""What each pass, the packing and the tiling of the KV cache save in a step: the difference before and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_compile.fused_calls import attention_of
from vllm_compile.spec import DTYPE_BYTES
from vllm_compile.targets import Chip

from .cost import Cost, Workload
from .graph import Call
from .kernels import Execution, plain
from .roofline import Time, predict

SCORE_PASSES = 4  # scores are written and read, and so are the probabilities made of them
UNTILED_KERNELS = 2  # more than one: products, softmax, products
NO_COST, NO_TIME = Cost(), Time()


@dataclass(frozen=True)
class Stage:
    """A model's operators at one point of its way through the passes."""

    name: str
    calls: Sequence[Call]


@dataclass(frozen=True)
class Saving:
    """What a step has no longer to do.

    Attributes:
        what: the pass, `lossless packing` or `KV tiling`.
        kernels: launches saved.
        bytes: of memory traffic saved.
        seconds: of predicted time saved.
        note: what else there is to say.
    """

    what: str
    kernels: int
    bytes: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Total:
    """Costs and launches of some kernels, and the time to expect of them."""

    cost: Cost = NO_COST
    launches: int = 0
    time: Time = NO_TIME

    def __add__(self, other: Total) -> Total:
        return Total(self.cost + other.cost, self.launches + other.launches, self.time + other.time)

    def __mul__(self, times: int) -> Total:
        return Total(self.cost * times, self.launches * times, self.time * times)

    def without(self, other: Total, what: str, note: str = "") -> Saving:
        """What is saved by doing `other` instead."""
        moved = self.cost.bytes - other.cost.bytes
        return Saving(what, self.launches - other.launches, moved, self.time.total - other.time.total, note)


@dataclass(frozen=True)
class Step:
    """A workload on a chip: what operators are timed for."""

    workload: Workload
    dtype: str
    chip: Chip

    def of(self, call: Call, execution: Execution = plain) -> Total:
        """One execution of a call."""
        kernels = execution(call, self.workload)
        parts = (Total(k.cost, k.launches, predict(k, self.dtype, self.chip)) for k in kernels)
        return sum(parts, Total())

    def total(self, calls: Iterable[Call], execution: Execution = plain) -> Total:
        """Of these calls, each as often as a step runs it."""
        return sum((self.of(call, execution) * call.times for call in calls), Total())


def run_in_step(calls: Iterable[Call]) -> list[Call]:
    """Without what depends on weights alone."""
    return [call for call in calls if not call.once]


def fusion_savings(stages: Sequence[Stage], step: Step) -> list[Saving]:
    """What each stage saves over the one before it, all weights plain, each operator a kernel of its own.

    What depends on weights alone is left out until a pass moves it out of the step: that is the pass's saving.
    """
    savings = []
    runs = [step.total(run_in_step(stage.calls)) for stage in stages]
    once = [step.total(call for call in stage.calls if call.once) for stage in stages]
    for i, stage in enumerate(stages[1:], start=1):
        lifted = once[i].launches < once[i - 1].launches
        before = runs[i - 1] + once[i - 1] if lifted else runs[i - 1]
        saving = before.without(runs[i], stage.name, "computed once, at compile time" if lifted else "")
        if saving.kernels or saving.bytes:
            savings.append(saving)
    return savings


def packing_saving(calls: Sequence[Call], step: Step, compiled: Execution) -> Saving:
    """Reading weights as they are stored instead of plain; where a library takes over, it reads them plain.

    Of calls whose bytes are the same either way nothing counts: how many launches their kernels take is not of packing.
    """
    ours = [call for call in calls if not any(kernel.library for kernel in compiled(call, step.workload))]
    packed = [call for call in ours if step.of(call, compiled).cost.bytes != step.of(call).cost.bytes]
    saving = step.total(packed).without(step.total(packed, compiled), "lossless packing")
    return saving if saving.bytes else Saving(saving.what, 0, 0, 0.0, "weights are read plain here")


def tiling_saving(calls: Sequence[Call], step: Step) -> tuple[Saving, int]:
    """Attention in tiles of the KV cache: its scores never go to memory.  Also the bytes they would take at once.

    Without tiles each layer writes a matrix [heads, queries, length] of scores in the activations' dtype, and one of
    probabilities, and reads both; what it masks is written too.
    """
    workload, chip = step.workload, step.chip
    moved = kernels = largest = 0
    for call in calls:
        if (attention := attention_of(call.spec)) is not None:
            q = attention.input("q")
            scores = workload.tokens * workload.length * q.size(-2) * DTYPE_BYTES[q.dtype]
            moved += SCORE_PASSES * scores * call.times
            kernels += UNTILED_KERNELS * call.times
            largest = max(largest, scores)
    seconds = moved / chip.sustained_bandwidth + kernels * chip.launch
    return Saving("KV tiling", kernels, moved, seconds), largest
