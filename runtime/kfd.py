"""The AMD GPU of this machine, as its driver (KFD) shows it: no HIP context is made, so an engine may still fork."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vllm_compile.errors import TargetError

TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
# Each counts in what the one before has left; of two for the same, the first that is set.
VISIBLE = (("ROCR_VISIBLE_DEVICES",), ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"))


@dataclass(frozen=True)
class AmdGpu:
    """What kernels depend on.

    Attributes:
        name: its processor as LLVM calls it, gfx942 for MI300X.
        memory_bytes: of the whole device.
    """

    name: str
    memory_bytes: int


def detect() -> AmdGpu:
    """The first GPU that this process may use.

    Raises:
        TargetError: there is no driver for AMD GPUs, or no GPU.
    """
    nodes = sorted((node for node in TOPOLOGY.glob("*") if node.name.isdigit()), key=lambda node: int(node.name))
    gpus = [(node, facts) for node in nodes if (facts := _properties(node)).get("simd_count")]
    for variables in VISIBLE:
        chosen = next((os.environ[name] for name in variables if name in os.environ), "0").split(",")[0].strip()
        if not chosen:
            gpus = []
        elif chosen.isdigit():  # not a UUID
            gpus = gpus[int(chosen) :]
    if not gpus:
        raise TargetError("no AMD GPU that this process may use; the artifact needs one")
    node, facts = gpus[0]
    memory = sum(_properties(bank).get("size_in_bytes", 0) for bank in node.glob("mem_banks/*"))
    return AmdGpu(_processor(facts["gfx_target_version"]), memory)


def _processor(version: int) -> str:
    """90402 -> gfx942, 90010 -> gfx90a: major, minor and stepping, the last two as hexadecimal digits."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _properties(folder: Path) -> dict[str, int]:
    """The numbers of a `properties` file, one a line after its name; none where it cannot be read."""
    try:
        lines = (folder / "properties").read_text().splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2}
