"""The peaks of the CPU that this runs on, measured: data sheets do not know a virtual machine's share."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vllm_compile.bandwidth import read_bandwidth
from vllm_compile.targets import Chip, Target
from vllm_compile.targets.cpu import AVX512_BF16, cache_bytes

READ_BYTES = 128 << 20  # and at least four times the cache in front of it
SIDE = 1024  # of the square matrices multiplied
READS, PRODUCTS, CALLS = 20, 20, 200  # tried; the fastest counts


def measure_cpu(target: Target, clock: Callable[[], float] = time.perf_counter) -> Chip:
    """A few seconds of reading memory and multiplying matrices on all of the process's threads.

    Peak and sustained rates are the same here.  Without AVX512-BF16 a bfloat16 product is one of float32 numbers, to
    the hardware.

    Args:
        target: the machine.
        clock: seconds; on a busy machine `time.process_time` does not count what others take (for one thread only).
    """
    cache = cache_bytes(3, target.l2_bytes)
    bandwidth = read_bandwidth(torch.device("cpu"), max(READ_BYTES, 4 * cache), READS, clock) * 1e9
    single = _matrix_flops(torch.float32, clock)
    half = _matrix_flops(torch.bfloat16, clock) if target.has(AVX512_BF16) else single
    matrix = {"float32": single, "bfloat16": half}
    threads = torch.get_num_threads()
    return Chip(
        name=f"{_model_name()}, {threads} threads",
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        cache_bytes=cache,
        bandwidth=bandwidth,
        matrix=matrix,
        vector=single,
        sustained_bandwidth=bandwidth,
        sustained_matrix=matrix,
        launch=_call_seconds(clock),
        vendor_launch=None,
        sources=("measured on this machine: torch's dot product, its matrix products, and its smallest call",),
    )


def _best(run: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of the fastest of several runs; the first warms up."""
    run()
    best = float("inf")
    for _ in range(repeats):
        began = clock()
        run()
        best = min(best, clock() - began)
    return best


def _matrix_flops(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    a, b = torch.ones(2, SIDE, SIDE, dtype=dtype)
    return 2 * SIDE**3 / _best(lambda: a @ b, PRODUCTS, clock)


def _call_seconds(clock: Callable[[], float]) -> float:
    """A parallel operator on next to nothing."""
    x = torch.ones(1 << 16)
    return _best(lambda: x.add_(1), CALLS, clock)


def _model_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
