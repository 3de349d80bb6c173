"""Host memory in huge pages: weights are streamed at every step, and small pages cost TLB misses."""

from __future__ import annotations

import mmap

import torch

HUGE_PAGE = 2 << 20
ALIGNMENT = 64  # one cache line, one AVX-512 register


def aligned(size: int) -> int:
    """`size` rounded up so that what follows starts on a cache line."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def allocate(size: int) -> torch.Tensor:
    """Zeroed uint8 [size], starting on a page, in huge pages where the kernel grants them."""
    mapping = mmap.mmap(-1, max(-(-size // HUGE_PAGE) * HUGE_PAGE, HUGE_PAGE))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)[:size]
