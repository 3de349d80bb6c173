"""From costs to time: the bound that a chip sets, and what is to be expected of it.

The bound (Williams et al. 2009) is the longer of moving the bytes and doing the FLOPs at the chip's peaks.  The
prediction takes sustained rates, and adds what each kernel's launch costs.  Bytes and FLOPs hide behind each other less
than the bound would let them: measured steps (docs/analysis.md) show their sum in our kernels, which load, unpack
and multiply in turn, and something between sum and maximum in a library's, for which the root of the squares stands.
A CPU's core restores packed weights while the next are on their way: of the two the longer counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot

from vllm_compile.targets import Chip

from .cost import Cost
from .kernels import Kernel

MEMORY, COMPUTE, LAUNCH = "memory", "compute", "launch"


@dataclass(frozen=True)
class Time:
    """Seconds of a prediction, by what they go to."""

    memory: float = 0.0
    compute: float = 0.0
    launch: float = 0.0

    @property
    def total(self) -> float:
        return self.memory + self.compute + self.launch

    @property
    def bound(self) -> str:
        """What takes the most of it."""
        parts = {MEMORY: self.memory, COMPUTE: self.compute, LAUNCH: self.launch}
        return max(parts, key=parts.__getitem__)

    def __add__(self, other: Time) -> Time:
        return Time(self.memory + other.memory, self.compute + other.compute, self.launch + other.launch)

    def __mul__(self, times: int) -> Time:
        return Time(self.memory * times, self.compute * times, self.launch * times)


def bound_seconds(cost: Cost, dtype: str, chip: Chip) -> float:
    """The least time for `cost` at the chip's peaks."""
    compute = cost.matrix_flops / chip.matrix[dtype] + cost.vector_flops / chip.vector
    return max(cost.bytes / chip.bandwidth, compute)


def predict(kernel: Kernel, dtype: str, chip: Chip) -> Time:
    """The time to expect of a kernel."""
    cost = kernel.cost
    memory = max(cost.bytes / chip.sustained_bandwidth, cost.unpack_flops / chip.vector)
    compute = cost.matrix_flops / chip.sustained_matrix[dtype] + cost.vector_flops / chip.vector
    overlap = hypot(memory, compute) / (memory + compute) if kernel.library and memory + compute else 1.0
    launch = chip.vendor_launch if kernel.library and chip.vendor_launch is not None else chip.launch
    return Time(memory * overlap, compute * overlap, kernel.launches * launch)
