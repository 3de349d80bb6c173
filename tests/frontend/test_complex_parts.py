"""Rotations in complex numbers become products of real ones."""

import pytest
import torch

from vllm_compile.errors import UnsupportedError
from vllm_compile.frontend.complex_parts import split_complex

aten = torch.ops.aten


class Rotation(torch.nn.Module):
    """As DeepSeek-V2 rotates; `turn` is what is done with two complex tensors."""

    def __init__(self, turn):
        super().__init__()
        self.turn = turn

    def forward(self, x_HTD, positions):
        angles = positions[:, None].float() * torch.tensor([1.0, 0.1, 0.01])
        rotation = (torch.polar(torch.ones_like(angles), angles) * 1.5).unsqueeze(0)
        pairs = torch.view_as_complex(x_HTD.float().reshape(*x_HTD.shape[:-1], -1, 2))
        return torch.view_as_real(self.turn(pairs, rotation)).flatten(2).type_as(x_HTD)


def traced(turn, generator):
    inputs = torch.randn(2, 7, 6, generator=generator), torch.arange(7)
    tokens = torch.export.Dim("T", min=2)
    shapes = ({1: tokens}, {0: tokens})
    return torch.export.export(Rotation(turn), inputs, dynamic_shapes=shapes, strict=False), inputs


def complex_operators(graph):
    values = [(node.target, node.meta.get("val")) for node in graph.nodes if node.op == "call_function"]
    return [target for target, value in values if isinstance(value, torch.Tensor) and value.is_complex()]


def test_same_values(generator):
    """Only the angles' own value is complex, from which tables are made."""
    program, inputs = traced(lambda pairs, rotation: pairs * rotation, generator)
    expected = program.module()(*inputs)
    split_complex(program.graph)
    program.graph.lint()
    assert complex_operators(program.graph) == [aten.polar.default]
    program.graph_module.recompile()
    torch.testing.assert_close(program.module()(*inputs), expected, rtol=1e-6, atol=1e-6)


def test_every_value_has_its_type(generator):
    program, _ = traced(lambda pairs, rotation: pairs * rotation, generator)
    split_complex(program.graph)
    (stack,) = (node for node in program.graph.nodes if node.target is aten.stack.default)
    assert stack.meta["val"].dtype == torch.float32
    assert [stack.meta["val"].shape[axis] for axis in (0, 2, 3)] == [2, 3, 2]


CONSTANT = torch.polar(torch.ones(2, 1, 3), torch.arange(3.0))


@pytest.mark.parametrize(
    ("turn", "operator"),
    [
        (lambda a, b: a / b, "div.Tensor"),
        (lambda a, b: a + b, "add.Tensor"),
        (lambda a, b: a - b, "sub.Tensor"),
        (lambda a, b: a * 1j, "mul.Tensor"),
        (lambda a, b: a * CONSTANT, "mul.Tensor"),
        (lambda a, b: CONSTANT, "view_as_real.default"),
        (lambda a, b: a * torch.ones(3).to(torch.complex64), "to.dtype"),
    ],
    ids=["div", "add", "sub", "scalar", "constant", "constant alone", "cast"],
)
def test_other_operators_are_named(turn, operator, generator):
    program, _ = traced(turn, generator)
    with pytest.raises(UnsupportedError, match=f"operator .*{operator}.* of complex numbers"):
        split_complex(program.graph)
