"""Configurations that a search on a GPU found to be the fastest (benchmarks/search_cuda_linear.py).

A record: the chip it was found on (`targets.cuda.CHIPS`), the call (op, N, K, residual, lossless), the least number of
tokens that its variant serves, the configuration, and how many microseconds sooner than with cuBLAS's product a decode
step ends, for each call in it.  What the searches found is told in benchmarks/baseline.md.
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
    """What a record is found by, besides its chip."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    return spec.op, N, K, spec.has_input("residual"), packed, min_tokens


def find(spec: OpSpec, packed: bool, min_tokens: int, chip: str) -> Record | None:
    """What is recorded for exactly this call: on this chip, else on another, whose multiprocessors are the same."""
    found = _load(PATH).get(key(spec, packed, min_tokens), {})
    return found.get(chip) or next(iter(found.values()), None)


@cache
def _load(path: Path) -> Mapping[tuple[Any, ...], dict[str, Record]]:
    """Records by call, then by chip."""
    names = ("op", "N", "K", "residual", "lossless", "min_tokens")
    found: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in json.loads(path.read_text()) if path.exists() else []:
        by_chip = found.setdefault(tuple(record[name] for name in names), {})
        by_chip[record["chip"]] = Record(record["config"], record["gain_us"])
    return found
