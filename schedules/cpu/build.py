"""PrimFuncs to one shared library that loads without the TVM runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import tvm
from tvm import tirx

from vllm_compile.targets import Target

from ..gcc import gcc
from . import pipeline

PARALLEL_SOURCE = Path(__file__).parent / "parallel.c"


def build_library(kernels: Mapping[str, tirx.PrimFunc], target: Target, path: Path) -> None:
    """Compile `kernels` (symbol -> function) for `target` into the shared library `path`.

    The library depends on apache-tvm-ffi's ABI alone; its parallel loops run on OpenMP.

    Raises:
        TargetError: the C compiler that links the library is missing or fails.
    """
    functions = {
        symbol: function.with_attr("global_symbol", symbol).with_attr("tirx.noalias", True)
        for symbol, function in sorted(kernels.items())
    }
    machine = tvm.target.Target(target.tvm_config())
    built = tvm.compile(tvm.IRModule(functions), target=machine, tir_pipeline=pipeline.NAME)
    with tempfile.TemporaryDirectory() as scratch:
        parallel = str(Path(scratch) / "parallel.o")
        gcc("-O2", "-fPIC", "-fopenmp", "-c", str(PARALLEL_SOURCE), "-o", parallel)
        built.export_library(str(path), addons=[parallel], cc="gcc", options=["-fopenmp"])
