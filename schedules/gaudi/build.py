"""The fused kernels of an artifact as sources, in one archive: TPC-C, glue code, operators for torch, a Makefile.

Intel's compiler for TPCs is not public, so nothing is compiled here; docs/targets.md says how it is done where it is.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from vllm_compile.targets import Target

from . import glue
from .kernel import Kernel

EPOCH = (1980, 1, 1, 0, 0, 0)  # of all files, so that equal kernels make equal archives


def sources(kernels: Mapping[str, Kernel], device: str) -> dict[str, str]:
    """Files by name, for the device `gaudi2` or `gaudi3`."""
    return {
        **{f"{symbol}.c": glue.kernel_source(symbol, kernel) for symbol, kernel in kernels.items()},
        "glue.cpp": glue.glue_source(kernels, device),
        "operators.cpp": glue.operators_source(kernels),
        "Makefile": glue.makefile(kernels, device),
    }


def build_library(kernels: Mapping[str, Kernel | None], target: Target, path: Path) -> None:
    """Write the archive `path`; calls that torch does alone have no kernel in it."""
    ours = {symbol: kernel for symbol, kernel in sorted(kernels.items()) if kernel is not None}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sources(ours, target.name).items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), text, zipfile.ZIP_DEFLATED)
