"""A linear layer whose weight is that of the expert each row goes to."""

import torch
from tvm import relax

from . import linear, route
from .base import OwnOp


def reference(x: torch.Tensor, experts: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, weight: torch.Tensor):
    """x [T, k, K], weight [E, N, K] -> [T, k, N]; `experts`, `order` and `ends` [T, k] are those of `route`."""
    rows = [linear.reference(row, weight[e]) for row, e in zip(x.flatten(0, 1), experts.flatten().long(), strict=True)]
    return torch.stack(rows).view(*experts.shape, -1) if rows else x.new_empty(*experts.shape, weight.shape[1])


def sample(
    generator: torch.Generator,
    dtype: torch.dtype,
    tokens: int = 5,
    K: int = 96,
    N: int = 64,
    experts: int = 8,
    top_k: int = 2,
):
    routed, _ = sample_routing(generator, tokens, experts, top_k)
    x_TkK = torch.randn(tokens, top_k, K, generator=generator).to(dtype)
    weight = (torch.randn(experts, N, K, generator=generator) * K**-0.5).to(dtype)
    return {"x": x_TkK, **routed, "weight": weight}, {}


def sample_routing(generator: torch.Generator, tokens: int, experts: int, top_k: int):
    """Random groups, and the scores [tokens, top_k] that go with them."""
    inputs, attributes = route.sample(generator, torch.float32, tokens, experts, top_k)
    chosen, scores, order, ends = route.reference(**inputs, **attributes)
    return {"experts": chosen, "order": order, "ends": ends}, scores


def infer(i, a):
    return relax.TensorType([*i["experts"].shape.values, i["weight"].shape.values[1]], i["x"].dtype)


EXPERT_LINEAR = OwnOp("expert_linear", infer, reference, sample, linear.TOLERANCE, weights=("weight",))
