"""The fingerprint of the machine that kernels are compiled on, or for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vllm_compile.errors import TargetError
from vllm_compile.targets import CHIPS, Target, cuda, resolve
from vllm_compile.targets.cuda import CudaTarget
from vllm_compile.targets.gaudi import GaudiTarget
from vllm_compile.targets.rocm import RocmTarget
from vllm_compile.toolchain import kernel_toolchain

from .fingerprint import Fingerprint
from .gpu import first_visible

INTRINSICS = 1  # raise it when a tensor intrinsic changes its meaning: records before that are stale then


def fingerprint(target: Target, board: str = "") -> Fingerprint:
    """This machine as `target` uses it; what cannot be found out stays unknown, and is not compared then.

    An accelerator that is not at hand is the one that the target's facts are of.  A `board` runs what is built here for
    a CPU, and is known by its key alone: nobody asks it for cores and clocks.
    """
    if board:
        return replace(_cpu(target), device=board, cores=0, core_mhz=0, memory_mhz=0)
    if isinstance(target, CudaTarget):
        return with_gpu(_absent(target, target.arch, "", target.multiprocessors))
    if isinstance(target, RocmTarget):
        return _absent(target, target.arch, target.device, target.compute_units)
    if isinstance(target, GaudiTarget):
        return _absent(target, target.name, CHIPS[target.name][target.name].name, target.tpcs)
    return _cpu(target)


def machines_here() -> Sequence[Fingerprint]:
    """What can be built for and measured here: this CPU, and CUDA's first GPU."""
    return [machine for name in ("cpu", cuda.NAME) if (machine := _usable(name)) is not None]


def _usable(name: str) -> Fingerprint | None:
    """This machine as the target of that name; None if it is none, or lacks what candidates are built with."""
    try:
        if name == cuda.NAME:
            gpu = first_visible()
            if gpu is None:
                return None
            cuda.require(gpu.capability, gpu.release)
        target = resolve(name)
        kernel_toolchain(target)
        return fingerprint(target)
    except (TargetError, PackageNotFoundError):
        return None


def with_gpu(machine: Fingerprint) -> Fingerprint:
    """The machine with what the driver tells of CUDA's first GPU, as it was where there is none."""
    gpu = first_visible()
    if gpu is None:
        return machine
    named = replace(machine, device=gpu.name, driver=gpu.driver)
    return replace(named, core_mhz=gpu.core_mhz, memory_mhz=gpu.memory_mhz)


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
