"""x86-64 CPUs: AVX2 with FMA, AVX-512, and AVX512-BF16 where the machine has it."""

from __future__ import annotations

import platform
from pathlib import Path

from vllm_compile.errors import TargetError

from .base import Target

# Microarchitecture levels of the x86-64 psABI: code for a level runs on every CPU that has its features.
AVX2 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
AVX512 = frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"})
AVX512_BF16 = "avx512_bf16"

DEFAULT_L1 = 32 << 10
DEFAULT_L2 = 1 << 20


def host_features() -> frozenset[str]:
    """Instruction sets of this machine, as /proc/cpuinfo names them; empty where it cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "flags:")
    return frozenset(flags.split(":", 1)[1].split())


def cache_bytes(level: int, default: int) -> int:
    """Size of the data (or unified) cache of one core at `level`, in bytes."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind = (index / "type").read_text().strip()
            if int((index / "level").read_text()) == level and kind != "Instruction":
                return int((index / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return default


def detect() -> Target:
    """The CPU this process runs on.

    Raises:
        TargetError: the machine is not an x86-64 with AVX2 and FMA.
    """
    present = host_features()
    if platform.machine() != "x86_64" or not present >= AVX2:
        missing = ", ".join(sorted(AVX2 - present)) or f"an x86-64 processor (this one is {platform.machine()})"
        raise TargetError(f"target cpu needs {missing}; compile on a machine with AVX2 and FMA")
    wide = present >= AVX512
    bf16 = wide and AVX512_BF16 in present
    return for_features(AVX2 | (AVX512 if wide else frozenset()) | ({AVX512_BF16} if bf16 else frozenset()))


def for_features(features: frozenset[str]) -> Target:
    """The target of a CPU with just these instruction sets; cache sizes are this machine's."""
    wide = features >= AVX512
    tvm: dict[str, object] = {
        "kind": "llvm",
        "mtriple": "x86_64-unknown-linux-gnu",
        "mcpu": "x86-64-v4" if wide else "x86-64-v3",
    }
    if AVX512_BF16 in features:
        tvm["mattr"] = ("+avx512bf16",)
    return Target(
        name="cpu",
        tvm=tuple(tvm.items()),
        features=features,
        vector_lanes=16 if wide else 8,
        l1_bytes=cache_bytes(1, DEFAULT_L1),
        l2_bytes=cache_bytes(2, DEFAULT_L2),
    )
