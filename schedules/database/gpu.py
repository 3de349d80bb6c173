"""The NVIDIA GPU that CUDA calls its first, as nvidia-smi tells of it: CUDA itself takes seconds to start."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

FIELDS = "index,uuid,name,clocks.max.sm,clocks.max.memory,driver_version,compute_cap"


@dataclass(frozen=True)
class Gpu:
    """Attributes:
    index, uuid: what CUDA_VISIBLE_DEVICES may call it; nvidia-smi counts by bus.
    core_mhz, memory_mhz: highest clocks, 0 if unknown.
    capability: of compute, (0, 0) if unknown.
    """

    index: int
    uuid: str
    name: str
    core_mhz: int
    memory_mhz: int
    driver: str
    capability: tuple[int, int]

    @property
    def release(self) -> tuple[int, int]:
        """The driver's version, its first two numbers."""
        return _pair(self.driver)


def first_visible() -> Gpu | None:
    """The GPU that is CUDA's device 0 here; None where there is none, or nvidia-smi cannot tell which.

    CUDA_VISIBLE_DEVICES has indices, or how UUIDs begin; its first entry counts, and one that names nothing hides all.
    Of different GPUs CUDA's device 0 is the fastest, unless CUDA_DEVICE_ORDER=PCI_BUS_ID: an index names none of them.
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#cuda-environment-variables
    """
    found = _first()
    return found[0] if len(found) == 1 else None


def is_ambiguous() -> bool:
    """True where there are GPUs, any of which might be CUDA's device 0: `first_visible` gives none then."""
    return len(_first()) > 1


def _first() -> Sequence[Gpu]:
    """Those that may be CUDA's device 0."""
    gpus = _gpus()
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    if first.isdecimal():
        by_bus = len({gpu.name for gpu in gpus}) == 1 or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        named = [gpu for gpu in gpus if gpu.index == int(first)]
        return named if by_bus or not named else gpus
    return [gpu for gpu in gpus if first and gpu.uuid.startswith(first)]


def _gpus() -> Sequence[Gpu]:
    """All of this machine, whichever are visible."""
    try:
        command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except OSError:
        return []
    rows = [[part.strip() for part in line.split(",")] for line in lines]
    return [
        Gpu(int(index), uuid, name, _number(core), _number(memory), driver, _pair(capability))
        for index, uuid, name, core, memory, driver, capability in (row for row in rows if len(row) == 7)
        if index.isdecimal()
    ]


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _pair(text: str) -> tuple[int, int]:
    major, _, rest = text.partition(".")
    return _number(major), _number(rest.partition(".")[0])
