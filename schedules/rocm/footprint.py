"""What a launch of a kernel asks of the chip: what tells its configurations apart, before any of them has run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Footprint:
    """A launch; see `estimate.py` for what follows from it.

    Families that list a space of configurations have a method `footprint(spec, config, tokens, target)`.

    Attributes:
        bytes: that the call must move, each once.
        blocks: thread blocks of the grid.
        waves: of a thread block.
        rounds: of loads that a wave waits for, one after the other.
        block_bytes: that a thread block moves, from whatever cache or memory.
        mfmas: matrix instructions of a wave.
        instructions: vector instructions of a wave besides, roughly.
        lds_bytes: that a thread block writes to and reads from LDS.
        rounds_after: of loads, of a second launch that adds up what blocks of the first leave; 0 if there is none.
    """

    bytes: int
    blocks: int
    waves: int
    rounds: int
    block_bytes: int
    mfmas: int = 0
    instructions: int = 0
    lds_bytes: int = 0
    rounds_after: int = 0
