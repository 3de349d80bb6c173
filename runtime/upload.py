"""Weights on their way to a GPU: read from mapped files by several threads, each through pinned memory of its own.

`Tensor.to` takes one page after another through the driver's one buffer.  What bounds it are the mapping's page
faults and a core's copy, so threads help until the link is full.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

THREADS = 8
CHUNK_BYTES = 16 << 20


def upload(tensors: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors on `device`, by name; on a CPU they are what was given.  Other chips than GPUs take them one by one.

    What is on the device already stays there.
    """
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    own = threading.local()

    def start() -> None:
        own.pinned = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        own.stream = torch.cuda.Stream(device)

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cpu":
            return tensor.to(device)
        placed = torch.empty_like(tensor, device=device, memory_format=torch.contiguous_format)
        source, target = (t.contiguous().view(-1).view(torch.uint8) for t in (tensor, placed))
        with torch.cuda.stream(own.stream):
            for part, place in zip(source.split(CHUNK_BYTES), target.split(CHUNK_BYTES), strict=True):
                pinned = own.pinned[: part.numel()].copy_(part)
                place.copy_(pinned, non_blocking=True)
                own.stream.synchronize()
        return placed

    torch.cuda.current_stream(device).synchronize()  # memory that it freed may be given to the threads' streams
    with ThreadPoolExecutor(THREADS, initializer=start) as pool:
        return dict(zip(tensors, pool.map(copy, tensors.values()), strict=True))
