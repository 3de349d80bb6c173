"""PrimFuncs to one shared library that loads without the TVM runtime, by each target's own means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tvm import tirx

from vllm_compile.targets import Target

from .cpu import build as cpu
from .cuda import build as cuda
from .gaudi import build as gaudi
from .rocm import build as rocm

BUILDERS: Mapping[str, Callable[..., Any]] = {
    "cpu": cpu.build_library,
    "cuda": cuda.build_library,
    "rocm": rocm.build_library,
    "gaudi2": gaudi.build_library,
    "gaudi3": gaudi.build_library,
}


def build_library(kernels: Mapping[str, tirx.PrimFunc], target: Target, path: Path) -> None:
    """Compile `kernels` (symbol -> function) for `target` into the shared library `path`.

    Raises:
        TargetError: a compiler that the target needs is missing or fails.
    """
    BUILDERS[target.name](kernels, target, path)
