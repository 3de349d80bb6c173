"""Configurations that a search on a GPU found to be the fastest (benchmarks/kernels_cuda_linear.py search).

A record: the call (op, N, K, residual, lossless), the least number of tokens that its variant serves, the
configuration, and the microseconds that it and cuBLAS took for as many tokens as the variant is made for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from vllm_compile.spec import OpSpec

from ..family import Config

PATH = Path(__file__).with_name("records.json")


def key(spec: OpSpec, packed: bool, min_tokens: int) -> tuple[Any, ...]:
    """What a record is found by."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    return spec.op, N, K, spec.has_input("residual"), packed, min_tokens


def find(spec: OpSpec, packed: bool, min_tokens: int) -> Config | None:
    """The recorded configuration for exactly this call, if there is one."""
    return _load(PATH).get(key(spec, packed, min_tokens))


@cache
def _load(path: Path) -> Mapping[tuple[Any, ...], Config]:
    records = json.loads(path.read_text()) if path.exists() else []
    names = ("op", "N", "K", "residual", "lossless", "min_tokens")
    return {tuple(record[name] for name in names): record["config"] for record in records}
