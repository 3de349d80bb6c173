"""A library of ROCm kernels, built as for an artifact, whose launches a CPU runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import tvm_ffi
from tvm import tirx

from vllm_compile.schedules.rocm.build import build_library
from vllm_compile.targets.rocm import RocmTarget

from . import hip, opencl
from .tensor import call


class OnHost:
    """`kernels` (symbol -> function) as kernels.so, and as a program that executes what it launches."""

    def __init__(self, kernels: Mapping[str, tirx.PrimFunc], target: RocmTarget, folder: Path) -> None:
        path = folder / "kernels.so"
        self.resources = build_library(kernels, target, path)
        self.library = tvm_ffi.load_module(str(path))
        self._program = opencl.Program(kernels)

    def run(self, symbol: str, *tensors: torch.Tensor) -> list[hip.Launch]:
        """Call a kernel on host tensors; returns what it launched."""
        with hip.recording(self._program) as recorded:
            call(self.library[symbol], *tensors)
        return recorded.launches
