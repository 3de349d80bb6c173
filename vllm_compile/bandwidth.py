"""How fast a device reads its memory: the bound of what streams weights."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def read_bandwidth(
    device: torch.device, size: int = 1 << 30, repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> float:
    """GB/s at which torch reads a device's memory: the best of several dot products over `size` bytes.

    A kernel that has more loads in flight can be faster.
    """
    data = torch.ones(2, size // 8, device=device)
    best = float("inf")
    for _ in range(repeats):
        began = clock()
        torch.dot(data[0], data[1]).item()
        best = min(best, clock() - began)
    return size / best / 1e9
