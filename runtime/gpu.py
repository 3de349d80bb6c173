"""The GPU of this machine, asked through NVML: no CUDA context is made, so that an engine may still fork."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from vllm_compile.errors import TargetError

NVML = "libnvidia-ml.so.1"
NAME_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE


@dataclass(frozen=True)
class Gpu:
    """What kernels depend on.

    Attributes:
        capability: compute capability, (9, 0) for Hopper.
        driver: version of the NVIDIA driver.
        memory_bytes: of the whole card.
    """

    name: str
    capability: tuple[int, int]
    driver: tuple[int, int]
    memory_bytes: int


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


def detect() -> Gpu:
    """The first GPU that this process may use.

    Raises:
        TargetError: there is no NVIDIA driver, or no GPU.
    """
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError as error:
        raise TargetError("no NVIDIA driver here; the artifact needs a Hopper GPU (H100, H200)") from error

    def call(function: str, *arguments: object) -> None:
        if status := getattr(nvml, function)(*arguments):
            raise TargetError(f"no usable NVIDIA GPU here ({function} answers {status})")

    call("nvmlInit_v2")
    try:
        device = ctypes.c_void_p()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
        if visible.isdigit():
            call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(int(visible)), ctypes.byref(device))
        else:  # a UUID, or nothing
            call("nvmlDeviceGetHandleByUUID", ctypes.c_char_p(visible.encode()), ctypes.byref(device))
        name, version = (ctypes.create_string_buffer(NAME_BYTES) for _ in range(2))
        major, minor, memory = ctypes.c_int(), ctypes.c_int(), _Memory()
        call("nvmlDeviceGetName", device, name, NAME_BYTES)
        call("nvmlSystemGetDriverVersion", version, NAME_BYTES)
        call("nvmlDeviceGetCudaComputeCapability", device, ctypes.byref(major), ctypes.byref(minor))
        call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
    finally:
        nvml.nvmlShutdown()
    driver = version.value.decode().split(".")
    return Gpu(name.value.decode(), (major.value, minor.value), (int(driver[0]), int(driver[1])), memory.total)
