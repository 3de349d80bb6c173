"""Tensors that are filled part by part become concatenations; other writes in place are refused."""

import pytest
import torch

from vllm_compile.errors import UnsupportedError
from vllm_compile.frontend.in_place import replace_writes


class Filled(torch.nn.Module):
    def __init__(self, fill):
        super().__init__()
        self.fill = fill

    def forward(self, a_TA, b_TB):
        width = a_TA.shape[1] + b_TB.shape[1]
        return self.fill(a_TA.new_empty(a_TA.shape[0], width), a_TA, b_TB) * 2


def traced(fill, generator):
    inputs = torch.randn(7, 4, generator=generator), torch.randn(7, 3, generator=generator)
    tokens = torch.export.Dim("T", min=2)
    return torch.export.export(Filled(fill), inputs, dynamic_shapes=({0: tokens}, {0: tokens}), strict=False), inputs


def in_order(y, a, b):
    y[:, :4].copy_(a)
    y[:, 4:].copy_(b)
    return y


def backwards(y, a, b):
    y[:, 3:].copy_(a)
    y[:, :3].copy_(b)
    return y


def repeated(y, a, b):
    """One column fills several, and in another dtype."""
    y[:, :4].copy_(a[:, :1].double())
    y[:, 4:].copy_(b)
    return y + y


def scattered(y, a, b):
    """Ones where the largest of each row are."""
    z = torch.zeros_like(a)
    z.scatter_(1, a.topk(2, dim=-1)[1], 1)
    return torch.cat([z, b], dim=1)


def test_what_is_scattered(generator):
    program, inputs = traced(scattered, generator)
    expected = program.module()(*inputs)
    replace_writes(program.graph)
    program.graph.lint()
    assert "aten.scatter.value" in {str(node.target) for node in program.graph.nodes}
    program.graph_module.recompile()
    assert torch.equal(program.module()(*inputs), expected)


@pytest.mark.parametrize("fill", [in_order, backwards, repeated])
def test_same_values(fill, generator):
    program, inputs = traced(fill, generator)
    expected = program.module()(*inputs)
    replace_writes(program.graph)
    program.graph.lint()
    operators = [str(node.target) for node in program.graph.nodes]
    assert "aten.cat.default" in operators
    assert not any("copy_" in name or "empty" in name for name in operators)
    program.graph_module.recompile()
    assert torch.equal(program.module()(*inputs), expected)


def with_a_gap(y, a, b):
    y[:, :4].copy_(a)
    y[:, 5:].copy_(b[:, 1:])
    return y


def twice(y, a, b):
    y[:, :4].copy_(a)
    y[:, 3:].copy_(a)
    return y


def read_before(y, a, b):
    y[:, :4].copy_(a)
    seen = y + 1
    y[:, 4:].copy_(b)
    return seen + y


def every_other(y, a, b):
    y[:, ::2].copy_(a)
    y[:, 1::2].copy_(b)
    return y


def token_by_token(y, a, b):
    """Where the second part begins depends on the number of tokens."""
    z = a.new_empty(2 * a.shape[0], 4)
    z[: a.shape[0]].copy_(a)
    z[a.shape[0] :].copy_(a)
    return z


def over_a_value(y, a, b):
    z = a * 1
    z[:, :3].copy_(b)
    return z


def added(y, a, b):
    z = a * 1
    z[:, :2].add_(1)
    return z


def scattered_under_a_view(y, a, b):
    z = torch.zeros_like(a)
    view = z[:, :2]
    z.scatter_(1, a.topk(2, dim=-1)[1], 1)
    return view


def taken_but_looked_at_below(y, a, b):
    z = a * 1
    taken = z[:, :2].add_(1)
    return z + taken.sum()


REFUSED = [
    taken_but_looked_at_below,
    with_a_gap,
    twice,
    read_before,
    every_other,
    token_by_token,
    over_a_value,
    added,
    scattered_under_a_view,
]


@pytest.mark.parametrize("fill", REFUSED)
def test_other_writes_are_refused(fill, generator):
    """They would be lost: nobody uses what they return, or somebody looks at what was written to."""
    program, _ = traced(fill, generator)
    with pytest.raises(UnsupportedError, match=r"operator (copy_|add_|scatter_)\..* writes in place"):
        replace_writes(program.graph)


def test_a_write_of_which_only_the_result_is_seen(generator):
    """Its converter gives a value, which is all that anybody takes."""

    def fill(y, a, b):
        return (a * 1).add_(1)

    program, _ = traced(fill, generator)
    replace_writes(program.graph)
