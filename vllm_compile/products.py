"""Matrix products and what follows them, in torch: what the operators `linear` and `gate_up_silu` mean.

Imports no TVM: where kernels are tuned, which may be another machine, their results are compared with these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

ROWS = 1 << 14  # of a weight that are widened at a time


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    wide: torch.dtype = torch.float32,
) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N], residual [..., N] -> [..., N].

    Accumulates in `wide`, adds the bias in it, rounds to x's dtype, then adds the residual
    and rounds again: what `residual + nn.Linear(x)` does.
    """
    y = torch.cat([x.to(wide) @ rows.to(wide).T for rows in weight.split(ROWS)], dim=-1)
    if bias is not None:
        y = y + bias.to(wide)
    y = y.to(x.dtype)
    return y if residual is None else residual + y


def gate_up_silu(x: torch.Tensor, weight: torch.Tensor, wide: torch.dtype = torch.float32) -> torch.Tensor:
    """x [..., K], weight [2*I, K] (gate rows, then up rows) -> [..., I], rounded as in Hugging Face's MLP."""
    gate, up = linear(x, weight, wide=wide).chunk(2, dim=-1)
    return functional.silu(gate) * up


REFERENCES: Mapping[str, Callable[..., torch.Tensor]] = {"linear": linear, "gate_up_silu": gate_up_silu}  # by operator
