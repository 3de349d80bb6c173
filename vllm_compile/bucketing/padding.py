"""What buckets cost on a trace: how much of the work is padding, and how many graphs are there for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_compile.runtime.buckets import Bucket, Work


@dataclass(frozen=True)
class Padding:
    """Shares are of what the steps need themselves: 0.5 is half as much again.

    Attributes:
        work, tokens, blocks: share of padding in work at a chip's peaks, in tokens computed, in KV blocks read.
        used: buckets that a step of the trace ran in.
        missed: shapes that no bucket covers: a graph of each is compiled while requests wait.
    """

    work: float
    tokens: float
    blocks: float
    used: frozenset[Bucket]
    missed: int


def padding_of(find: Callable[[Bucket], Bucket | None], steps: Mapping[Bucket, int], work: Work) -> Padding:
    """Run the steps of a trace in the buckets that `find` names."""
    ran = {step: find(step) or step for step in steps}

    def share(size: Callable[[Bucket], float]) -> float:
        needed = sum(size(step) * times for step, times in steps.items())
        return sum(size(ran[step]) * times for step, times in steps.items()) / needed - 1 if needed else 0.0

    missed = sum(find(step) is None for step in steps)
    tokens, blocks = share(lambda shape: shape.batch * shape.queries), share(lambda shape: shape.blocks)
    return Padding(share(work.of), tokens, blocks, frozenset(ran.values()), missed)
