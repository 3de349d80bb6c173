"""DeepSeek's choice of groups of experts is found in its graph."""

import pytest
import torch

from tests.models import group_router
from vllm_compile.frontend.group_limit import name_group_limits
from vllm_compile.frontend.in_place import replace_writes
from vllm_compile.ops import LIMIT_GROUPS

aten = torch.ops.aten
OURS = torch.ops.vllm_compile.limit_groups.default


def limited(graph):
    """The arguments of each limit that is found."""
    replace_writes(graph)
    name_group_limits(graph)
    graph.lint()
    return [tuple(node.args[1:]) for node in graph.nodes if node.target is OURS]


def exported(module, *inputs):
    tokens = torch.export.Dim("T", min=2)
    return torch.export.export(module, inputs, dynamic_shapes=({0: tokens},), strict=False)


def test_of_transformers():
    program = exported(group_router(), torch.randn(5, 32))
    assert limited(program.graph) == [(4, 2, 1, True)]


class Limit(torch.nn.Module):
    """What transformers computes, of `scores` [T, 9]."""

    def __init__(self, **changes):
        super().__init__()
        self.of = {
            "fill": 0.0,
            "one": 1,
            "kept": 2,
            "largest": True,
            "reduce": lambda x: x.max(dim=-1).values,
        } | changes

    def forward(self, scores):
        of = self.of
        best = of["reduce"](scores.view(-1, 3, 3))
        chosen = torch.topk(best, k=of["kept"], dim=-1, largest=of["largest"], sorted=False)[1]
        kept = torch.zeros_like(best)
        kept.scatter_(1, chosen, of["one"])
        mask = kept.unsqueeze(of.get("axis", -1)).expand(-1, 3, 3).reshape(-1, 9)
        return scores.masked_fill(~mask.bool(), of["fill"])


@pytest.mark.parametrize(
    ("changes", "best"),
    [({}, 1), ({"fill": float("-inf"), "reduce": lambda x: x.topk(2, dim=-1)[0].sum(dim=-1)}, 2)],
    ids=["DeepSeek-V2", "DeepSeek-V3"],
)
def test_it_means_the_same(changes, best, generator):
    scores, limit = torch.rand(7, 9, generator=generator), Limit(**changes)
    program = exported(limit, scores)
    assert limited(program.graph) == [(3, 2, best, not changes)]
    assert torch.equal(LIMIT_GROUPS.reference(scores, 3, 2, best, not changes), limit(scores))
    assert not torch.equal(LIMIT_GROUPS.reference(scores, 3, 1, best, not changes), limit(scores))
    assert not torch.equal(LIMIT_GROUPS.reference(scores, 3, 2, best, bool(changes)), limit(scores))


@pytest.mark.parametrize(
    "changes",
    [
        {"fill": -1.0},
        {"one": 2},
        {"largest": False},
        {"axis": 1},
        {"reduce": lambda x: x.min(dim=-1).values},
        {"reduce": lambda x: x.max(dim=1).values},
        {"reduce": lambda x: x.topk(2, dim=-1, largest=False)[0].sum(-1)},
    ],
    ids=["another value", "another mark", "the worst", "across groups", "the least", "another axis", "the least two"],
)
def test_limits_of_another_kind(changes, generator):
    """They stay as they are, to be refused by name."""
    program = exported(Limit(**changes), torch.rand(7, 9, generator=generator))
    assert limited(program.graph) == []
