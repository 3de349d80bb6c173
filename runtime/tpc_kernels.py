"""Our kernels on a Gaudi's vector cores, where they have been built: operators of torch called `vllm_compile_tpc::…`.

An artifact holds their sources (docs/targets.md says how they are built).  Whoever has built them names two libraries:
GC_KERNEL_PATH, which Intel's graph compiler loads kernels from, and VLLM_COMPILE_TPC, which registers the operators.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from vllm_compile.errors import TargetError

NAMESPACE = "vllm_compile_tpc"
LIBRARY_VARIABLE = "VLLM_COMPILE_TPC"


@cache
def habana() -> Any:
    """Intel's torch bridge (`habana_frameworks.torch`), None where it is not installed."""
    if find_spec("habana_frameworks") is None:
        return None
    from habana_frameworks import torch as bridge

    return bridge


def device() -> torch.device:
    """A Gaudi where there is one, else the CPU."""
    bridge = habana()
    return torch.device("hpu" if bridge is not None and bridge.hpu.is_available() else "cpu")


@cache
def _operators() -> Any:
    """The operators of the library that is named, None if none is.

    Raises:
        TargetError: it cannot be loaded.
    """
    path = os.environ.get(LIBRARY_VARIABLE)
    if not path:
        return None
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise TargetError(
            f"{LIBRARY_VARIABLE}={path} cannot be loaded ({error}); build it from the artifact"
        ) from error
    return getattr(torch.ops, NAMESPACE)


def kernel_of(symbol: str | None, where: torch.device) -> Callable[..., tuple[torch.Tensor, ...]] | None:
    """The operator of a kernel's symbol, None if it has none, or runs on another device."""
    if symbol is None or where.type != "hpu" or _operators() is None:
        return None
    return getattr(_operators(), symbol, None)


def as_graphs(function: torch.nn.Module, where: torch.device) -> Callable[..., torch.Tensor]:
    """The function recorded as a graph for each set of shapes that it is called with, on a Gaudi; else itself."""
    if where.type != "hpu":
        return function
    return habana().hpu.wrap_in_hpu_graph(function, disable_tensor_cache=True)
