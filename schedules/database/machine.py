"""The fingerprint of the machine that kernels are compiled on, or for."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import version
from pathlib import Path

from vllm_compile.targets import CHIPS, Target
from vllm_compile.targets.cuda import CudaTarget
from vllm_compile.targets.gaudi import GaudiTarget
from vllm_compile.targets.rocm import RocmTarget

from .fingerprint import Fingerprint

INTRINSICS = 1  # raise it when a tensor intrinsic changes its meaning: records before that are stale then


def fingerprint(target: Target) -> Fingerprint:
    """This machine as `target` uses it; what cannot be found out stays unknown, and is not compared then.

    An accelerator that is not at hand is the one that the target's facts are of.
    """
    if isinstance(target, CudaTarget):
        return _gpu(target)
    if isinstance(target, RocmTarget):
        return _absent(target, target.arch, target.device, target.compute_units)
    if isinstance(target, GaudiTarget):
        return _absent(target, target.name, CHIPS[target.name][target.name].name, target.tpcs)
    return _cpu(target)


def _absent(target: Target, arch: str, device: str, cores: int) -> Fingerprint:
    return Fingerprint(target.name, arch, device, cores, 0, 0, "", "", version("apache-tvm"), INTRINSICS)


def _cpu(target: Target) -> Fingerprint:
    tvm = dict(target.tvm)
    arch = " ".join([str(tvm["mcpu"]), *map(str, tvm.get("mattr", ()))])  # type: ignore[call-overload]
    cores = len(os.sched_getaffinity(0))
    return Fingerprint(target.name, arch, _cpu_name(), cores, _cpu_mhz(), 0, "", "", version("apache-tvm"), INTRINSICS)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _cpu_mhz() -> int:
    """The highest clock, where the kernel says so; the present one is no property of a machine."""
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()) // 1000
    except (OSError, ValueError):
        return 0


def _gpu(target: CudaTarget) -> Fingerprint:
    device, core_mhz, memory_mhz, driver = nvidia_smi()
    return Fingerprint(
        target.name,
        target.arch,
        device,
        target.multiprocessors,
        core_mhz,
        memory_mhz,
        driver,
        "",
        version("apache-tvm"),
        INTRINSICS,
    )


def nvidia_smi() -> tuple[str, int, int, str]:
    """Name, highest clocks (MHz) and driver of the first GPU; unknown where there is none."""
    query = "--query-gpu=name,clocks.max.sm,clocks.max.memory,driver_version"
    try:
        done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True)
        name, core, memory, driver = (part.strip() for part in done.stdout.splitlines()[0].split(","))
        return name, int(core), int(memory), driver
    except (OSError, IndexError, ValueError):
        return "", 0, 0, ""
