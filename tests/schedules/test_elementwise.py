"""Elementwise expressions: every function, every change of an index, against the reference."""

import pytest
import torch

from vllm_compile.expression import Node
from vllm_compile.ops import ELEMENTWISE
from vllm_compile.schedules.cpu.elementwise import Elementwise

from .expressions import T, every_function, inputs_of, rotation, spec_of
from .harness import assert_matches, compile_variants, results, run
from .levels import HOST, TARGETS

FAMILY = Elementwise()


def check(nodes, target, folder, generator, tokens=37):
    """Every variant matches, and a row alone is the same to the last bit."""
    inputs, attributes = inputs_of(nodes, generator, tokens), {"expression": tuple(nodes)}
    spec = spec_of(nodes)
    folder.mkdir(exist_ok=True)
    kernels = compile_variants(FAMILY, spec, target, folder)
    expected = results(ELEMENTWISE, inputs, attributes)[0].view([tokens, *spec.outputs[0].sizes()[1:]])
    rows = dict(spec.inputs)
    one = {name: tensor[3:4] if T in rows[name].shape else tensor for name, tensor in inputs.items()}
    for kernel in kernels.values():
        (actual,) = run(kernel, FAMILY, spec, target, inputs)
        assert_matches(ELEMENTWISE, (actual,), (expected,))
        assert torch.equal(run(kernel, FAMILY, spec, target, one)[0][0], actual[3])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [64, 37])
def test_every_function(width, dtype, target, generator, tmp_path):
    check(every_function(dtype, width), target, tmp_path, generator)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [32, 20])
def test_rotated_heads(head_dim, interleaved, dtype, generator, tmp_path):
    check(rotation(dtype, interleaved, head_dim=head_dim), HOST, tmp_path, generator)


def test_long_rows_are_cut_into_blocks(generator, tmp_path):
    row = (T, 9001)
    check(
        [Node("input", (), row, "float32", ("x0",)), Node("tanh", (0,), row, "float32")], HOST, tmp_path, generator, 4
    )


def test_rounds_where_the_nodes_say(generator, tmp_path):
    """(x + y) - y in bfloat16 is not x: the sum is rounded."""
    row = (T, 64)
    nodes = [Node("input", (), row, "bfloat16", (name,)) for name in ("x0", "x1")]
    nodes += [Node("add", (0, 1), row, "bfloat16"), Node("subtract", (2, 1), row, "bfloat16")]
    inputs, spec = inputs_of(nodes, generator, 9), spec_of(nodes)
    kernel = compile_variants(FAMILY, spec, HOST, tmp_path)[1]
    (actual,) = run(kernel, FAMILY, spec, HOST, inputs)
    assert torch.equal(actual, inputs["x0"] + inputs["x1"] - inputs["x1"])
    assert not torch.equal(actual, inputs["x0"])


def test_comparison_sees_a_wrong_function(generator, tmp_path):
    inputs, attributes = ELEMENTWISE.sample(generator, torch.float32)
    right = attributes["expression"]
    wrong = tuple(node._replace(op="gelu") if node.op == "silu" else node for node in right)
    spec = spec_of(wrong)
    actual = run(compile_variants(FAMILY, spec, HOST, tmp_path)[1], FAMILY, spec, HOST, inputs)
    assert_matches(ELEMENTWISE, actual, results(ELEMENTWISE, inputs, {"expression": wrong}))
    with pytest.raises(AssertionError):
        assert_matches(ELEMENTWISE, actual, results(ELEMENTWISE, inputs, attributes))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_repeated_axes(dtype, generator, tmp_path):
    """Slices of step 0, of heads and of the last axis."""
    nodes = [
        Node("input", (), (T, 3, 1, 16), dtype, ("x0",)),
        Node("slice", (0,), (T, 3, 2, 16), dtype, ((0, 1), (0, 1), (0, 0), (0, 1))),
        Node("slice", (0,), (T, 3, 2, 16), dtype, ((0, 1), (0, 1), (0, 0), (5, 0))),
        Node("multiply", (1, 2), (T, 3, 2, 16), dtype),
        Node("reshape", (3,), (T, 96), dtype),
    ]
    check(nodes, HOST, tmp_path / "kernels", generator)
