"""Configurations that a search on a GPU found to be the fastest (benchmarks/search_cuda_linear.py).

Those in records.json were found on an H100 (benchmarks/baseline.md): no other Hopper GPU has been searched on yet.

A record: the call (op, N, K, residual, lossless), the least number of tokens that its variant serves, the
configuration, and how many microseconds sooner than with cuBLAS's product a decode step ends, for each call in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vllm_compile.spec import OpSpec

from ..family import Config

PATH = Path(__file__).with_name("records.json")


@dataclass(frozen=True)
class Record:
    """The fastest of our configurations for a call, and the microseconds it gains on cuBLAS (below 0: it loses)."""

    config: Config
    gain_us: float


def key(spec: OpSpec, packed: bool, min_tokens: int) -> tuple[Any, ...]:
    """What a record is found by."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    return spec.op, N, K, spec.has_input("residual"), packed, min_tokens


def find(spec: OpSpec, packed: bool, min_tokens: int) -> Record | None:
    """What is recorded for exactly this call, if anything."""
    return _load(PATH).get(key(spec, packed, min_tokens))


@cache
def _load(path: Path) -> Mapping[tuple[Any, ...], Record]:
    records = json.loads(path.read_text()) if path.exists() else []
    names = ("op", "N", "K", "residual", "lossless", "min_tokens")
    return {tuple(r[name] for name in names): Record(r["config"], r["gain_us"]) for r in records}
