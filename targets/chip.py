"""What a chip can do at most, and what was seen of it: the numbers behind a roofline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# For chips that nobody measured, what was seen on an H200 when they were added (682cb93; `targets/cuda.py` has later
# figures): shares of the peaks, and launches.  A prediction from them is a guess with a reason.
H200_SHARE_OF_READS, H200_SHARE_OF_PRODUCTS = 0.94, 0.79
H200_LAUNCH, H200_VENDOR_LAUNCH = 2.4e-6, 5.1e-6
GUESSED = "sustained reads and launches: not measured; as on an H200, 0.94 of the peak and 2.4 us in a graph"
GUESSED_PRODUCTS = "sustained products: not measured; 0.79 of the peak, as on an H200"


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
