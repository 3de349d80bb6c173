"""The time of a kernel on a chip that is not at hand, from its footprint and the registers and LDS of its machine code.

It ranks configurations; it does not predict.  The first launch and clocks below the peak are left out, bandwidth is
the peak.

A compute unit runs its thread blocks in passes, of as many as registers, LDS and places for waves let in.  A pass takes
the longest of (Williams et al. 2009, a roofline of the compute unit):

- one wave on its own: each round of loads takes the latency, then its instructions (Little's law: so many bytes under
  way for so long; Volkov 2016, "Understanding Latency Hiding on GPUs");
- the blocks' bytes through L1, and through LDS after that;
- the waves' instructions on the SIMDs, matrix cores beside vectors.

The compute unit with most blocks sets the time (tail quantisation).  Beside that stands what all share: the bytes from
memory once, and all loads from L2, the longer of the two.  Neither hides behind the other entirely: the root of their
squares stands for something between maximum and sum, as in `analysis/roofline.py`.  A second launch adds its start and
its loads' latency.
"""

from __future__ import annotations

from math import hypot, inf

from vllm_compile.targets.chip import H200_LAUNCH
from vllm_compile.targets.rocm import ISSUE_CLOCKS, LDS_CLOCK_BYTES, SIMDS, RocmTarget

from .build import Resources
from .footprint import Footprint

LATENCY = 1e-6  # seconds of a load from busy memory: assumed, as the kernels are laid out for it (matmul.py)


def seconds_of(footprint: Footprint, resources: Resources, target: RocmTarget) -> float:
    """Seconds of a launch; infinite for a kernel that does not fit, or keeps registers in memory."""
    room = target.blocks(resources.registers, resources.lds_bytes, footprint.waves)
    if resources.spilled or resources.scratch_bytes or not room:
        return inf
    passes, rest = divmod(-(-footprint.blocks // target.compute_units), room)
    alone = passes * _pass(footprint, room, target) + (_pass(footprint, rest, target) if rest else 0)
    shared = max(
        footprint.bytes / target.bandwidth,
        footprint.blocks * footprint.block_bytes / (target.l2_clock_bytes * target.clock),
    )
    after = H200_LAUNCH + footprint.rounds_after * LATENCY if footprint.rounds_after else 0
    return hypot(alone, shared) + after


def _pass(footprint: Footprint, blocks: int, target: RocmTarget) -> float:
    """Seconds of so many thread blocks of a compute unit, side by side."""
    matrix, vector = footprint.mfmas * target.mfma_clocks, footprint.instructions * ISSUE_CLOCKS
    wave = footprint.rounds * LATENCY + (matrix + vector) / target.clock
    a_simd = -(-blocks * footprint.waves // SIMDS)
    moved = footprint.block_bytes / target.l1_clock_bytes + footprint.lds_bytes / LDS_CLOCK_BYTES
    return max(wave, blocks * moved / target.clock, a_simd * max(matrix, vector) / target.clock)
