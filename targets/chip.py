"""What a chip can do at most, and what was seen of it: the numbers behind a roofline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """A processor and its memory.

    Peaks are a data sheet's; sustained rates are the best that a program was seen to reach.

    Attributes:
        name: what people call it.
        memory_bytes: of its memory.
        cache_bytes: of the cache that all cores share.
        bandwidth: bytes/s of its memory, peak.
        matrix: FLOP/s of dense matrix products by dtype of their operands, peak; a multiply-add is two.
        vector: FLOP/s of float32 arithmetic outside matrix units, peak.
        sustained_bandwidth, sustained_matrix: the same, sustained.
        launch: seconds that a kernel of ours costs beyond its bytes and products: what of its start and end does not
            overlap with the kernels beside it.
        vendor_launch: the same of a library's kernel (cuBLAS, launched as torch does); None if no library takes part.
        sources: where the numbers come from.
    """

    name: str
    memory_bytes: int
    cache_bytes: int
    bandwidth: float
    matrix: Mapping[str, float]
    vector: float
    sustained_bandwidth: float
    sustained_matrix: Mapping[str, float]
    launch: float
    vendor_launch: float | None
    sources: tuple[str, ...]
