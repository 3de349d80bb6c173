"""The gated half of the experts' MLPs: `gate_up_silu` with the weight of each expert that a token goes to."""

import torch
from tvm import relax

from . import gate_up_silu
from .base import OwnOp
from .expert_linear import sample_routing


def reference(x: torch.Tensor, experts: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, weight: torch.Tensor):
    """x [T, K], weight [E, 2*I, K] -> [T, k, I]; `experts`, `order` and `ends` [T, k] are those of `route`."""
    top_k = experts.shape[1]
    pairs = zip(x.repeat_interleave(top_k, 0), experts.flatten().long(), strict=True)
    rows = [gate_up_silu.reference(row, weight[e]) for row, e in pairs]
    return torch.stack(rows).view(*experts.shape, -1) if rows else x.new_empty(*experts.shape, weight.shape[1] // 2)


def sample(
    generator: torch.Generator,
    dtype: torch.dtype,
    tokens: int = 5,
    K: int = 96,
    intermediate: int = 64,
    experts: int = 8,
    top_k: int = 2,
):
    routed, _ = sample_routing(generator, tokens, experts, top_k)
    x_TK = torch.randn(tokens, K, generator=generator).to(dtype)
    weight = (torch.randn(experts, 2 * intermediate, K, generator=generator) * K**-0.5).to(dtype)
    return {"x": x_TK, **routed, "weight": weight}, {}


def infer(i, a):
    return relax.TensorType([*i["experts"].shape.values, i["weight"].shape.values[1] // 2], i["x"].dtype)


EXPERT_GATE_UP_SILU = OwnOp(
    "expert_gate_up_silu", infer, reference, sample, gate_up_silu.TOLERANCE, weights=("weight",)
)
