"""A model in Relax with all that its artifact says of it, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tvm

from vllm_compile.errors import UnsupportedError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Model:
    """A model in Relax.

    Attributes:
        config: its configuration, as transformers has it.
        fields: content of its config.json.
        dtype: bfloat16 or float32.
        max_positions: positions that are served are below this.
        long_positions: see `long_positions` of `families.py`.
        module: `main(input_ids, positions, weights...) -> logits [1, T, V]`.
        read: gives the tensor of a parameter of `module`: a weight, or a position table.
    """

    config: Any
    fields: dict[str, Any]
    dtype: str
    max_positions: int
    long_positions: int
    module: tvm.IRModule
    read: Callable[[str], torch.Tensor]


def supported_dtype(dtype: str) -> str:
    """The dtype, if it is one that kernels compute in; else UnsupportedError."""
    if dtype not in DTYPES:
        raise UnsupportedError(f"dtype {dtype} is not supported; pass --dtype bfloat16 or float32")
    return dtype
