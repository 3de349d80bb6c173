"""Memory that is allocated once: on a host in huge pages, as small ones cost TLB misses; on a GPU from torch."""

from __future__ import annotations

import mmap

import torch

HUGE_PAGE = 2 << 20
ALIGNMENT = 64  # one cache line, one AVX-512 register


def aligned(size: int) -> int:
    """`size` rounded up so that what follows starts on a cache line."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def allocate(size: int, device: torch.device) -> torch.Tensor:
    """Zeroed uint8 [size] on `device`; on a host it starts on a page, in huge pages where the kernel grants them."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=torch.uint8, device=device)
    mapping = mmap.mmap(-1, max(-(-size // HUGE_PAGE) * HUGE_PAGE, HUGE_PAGE))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)[:size]
