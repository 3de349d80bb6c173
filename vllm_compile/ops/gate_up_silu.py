"""The gated half of a Llama MLP: silu(x @ gate.T) * (x @ up.T) from one merged weight."""

import torch

from vllm_compile.products import gate_up_silu as reference

from . import linear
from .base import OwnOp, Tolerance, like

TOLERANCE = linear.TOLERANCE | {
    "bfloat16": Tolerance(2**-6, 2e-2, "two results of linear layers are multiplied: their relative errors add up"),
}


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, K: int = 96, intermediate: int = 64):
    inputs, _ = linear.sample(generator, dtype, tokens, K, 2 * intermediate)
    return {"x": inputs["x"], "weight": inputs["weight"]}, {}


GATE_UP_SILU = OwnOp(
    "gate_up_silu",
    lambda i, a: like(i["x"], last=[a["out_features"] if "out_features" in a else i["weight"].shape.values[0] // 2]),
    reference,
    sample,
    TOLERANCE,
    weights=("weight",),
)
