"""The router of a mixture of experts: which experts serve a token, how much each counts, and the groups they make."""

import torch
from tvm import relax

from . import limit_groups
from .base import OwnOp, Tolerance


def reference(
    logits: torch.Tensor,
    top_k: int,
    normalise: bool,
    bias: torch.Tensor | None = None,
    sigmoid: int = 0,
    groups: int = 0,
    kept: int = 0,
    best: int = 1,
    epsilon: float = 0.0,
    least: float = 0.0,
):
    """logits [T, E], bias [E] -> experts, scores, order, ends, each [T, top_k]; int32 but for the scores: float32.

    experts: the largest logits of a token in falling order, of equal ones the first; with a bias, the largest sums of
        score and bias; with `groups`, those of the `kept` groups that `limit_groups` leaves.
    scores: the softmax of the logits, or the sigmoid of each, at those; divided if `normalise` by their sum and
        `epsilon`, or by `least` if that is more.
    order: the T * top_k entries of `experts`, numbered in memory's order, sorted by expert (stably).
    ends: for each place in `order`, where the group of entries of its expert ends.
    """
    scores_TE = logits.float().sigmoid() if sigmoid else logits.float().softmax(-1)
    seen = scores_TE if sigmoid or best > 1 else logits.float()  # softmax keeps the order of one, not of sums
    if bias is not None:
        seen = scores_TE + bias
    if groups:
        seen = seen.masked_fill(limit_groups.outside(seen, groups, kept, best), float("-inf"))
    experts = seen.sort(dim=-1, descending=True, stable=True).indices.narrow_copy(1, 0, top_k)
    scores = scores_TE.gather(-1, experts)
    if normalise:
        scores = scores / (scores.sum(-1, keepdim=True) + epsilon).clamp(min=least)
    by_expert, order = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(by_expert, by_expert, right=True)
    return experts.int(), scores, order.view(experts.shape).int(), ends.view(experts.shape).int()


def sample(generator: torch.Generator, dtype: torch.dtype, tokens: int = 5, experts: int = 8, top_k: int = 2):
    logits = torch.randn(tokens, experts, generator=generator).to(dtype)
    return {"logits": logits}, {"top_k": top_k, "normalise": True}


def infer(i, a):
    shape = [i["logits"].shape.values[0], a["top_k"]]
    return relax.TupleType([relax.TensorType(shape, dtype) for dtype in ("int32", "float32", "int32", "int32")])


TOLERANCE = Tolerance(2e-6, 1e-7, "exponentials by polynomials of our own, good to 2**-22; the experts are exact")
ROUTE = OwnOp(
    "route",
    infer,
    reference,
    sample,
    {"float32": TOLERANCE, "bfloat16": TOLERANCE, "int32": Tolerance(0.0, 0.0, "indices")},
    options=("sigmoid", "groups", "kept", "best", "epsilon", "least"),
)
