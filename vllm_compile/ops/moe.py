"""A mixture of experts as a model states it: each token goes through the MLPs of a few experts, and sums them."""

import torch

from . import expert_gate_up_silu, expert_linear, linear
from .base import OwnOp, like


def reference(
    x: torch.Tensor, experts: torch.Tensor, scores: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """x [T, D], experts and scores [T, k], gate_up [E, 2*I, D] (gate rows, then up rows), down [E, D, I] -> [T, D].

    Each expert's result is multiplied by its score in the wider dtype of the two; the sum is float32, rounded once:
    what transformers' grouped experts do.
    """
    h_TkI = expert_gate_up_silu.reference(x, experts, experts, experts, gate_up)
    y_TkD = expert_linear.reference(h_TkI, experts, experts, experts, down)
    return (y_TkD * scores[..., None]).float().sum(1).to(x.dtype)


def sample(
    generator: torch.Generator,
    dtype: torch.dtype,
    tokens: int = 5,
    width: int = 96,
    intermediate: int = 64,
    experts: int = 8,
    top_k: int = 2,
):
    inputs, _ = expert_gate_up_silu.sample(generator, dtype, tokens, width, intermediate, experts, top_k)
    _, scores = expert_linear.sample_routing(generator, tokens, experts, top_k)
    down = (torch.randn(experts, width, intermediate, generator=generator) * intermediate**-0.5).to(dtype)
    chosen = {"x": inputs["x"], "experts": inputs["experts"], "scores": scores}
    return {**chosen, "gate_up": inputs["weight"], "down": down}, {}


MOE = OwnOp("moe", lambda i, a: like(i["x"]), reference, sample, linear.TOLERANCE, weights=("gate_up", "down"))
