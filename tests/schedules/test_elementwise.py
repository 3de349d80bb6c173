"""Elementwise expressions: every function, every change of an index, against the reference."""

import pytest
import torch

from vllm_compile.expression import BINARY, UNARY, Node
from vllm_compile.ops import ELEMENTWISE
from vllm_compile.schedules.cpu.elementwise import Elementwise
from vllm_compile.spec import OpSpec, Sym, TensorSpec

from .harness import assert_matches, compile_variants, results, run
from .levels import HOST, TARGETS

FAMILY = Elementwise()
T = Sym.TOKENS
POSITIVE = {"sqrt", "rsqrt"}


def inputs_of(nodes, generator, tokens):
    """A tensor for each input node; leading unit axes are not in memory."""
    made = {}
    for node in nodes:
        if node.op == "input":
            shape = node.shape[node.shape.index(T) :] if T in node.shape else node.shape
            values = torch.randn([tokens if dim == T else dim for dim in shape], generator=generator) * 2
            made[node.parameters[0]] = values.to(getattr(torch, node.dtype))
    return made


def spec_of(nodes):
    tensors = [
        (n.parameters[0], TensorSpec(n.shape[n.shape.index(T) :] if T in n.shape else n.shape, n.dtype))
        for n in nodes
        if n.op == "input"
    ]
    out = nodes[-1]
    attributes = (("expression", tuple(nodes)),)
    return OpSpec("elementwise", tuple(tensors), (TensorSpec(out.shape[out.shape.index(T) :], out.dtype),), attributes)


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


def every_function(dtype, width):
    """All of them side by side in one concat."""
    row = (T, width)
    nodes = [Node("input", (), row, dtype, ("x0",)), Node("input", (), (width,), dtype, ("x1",))]
    nodes += [Node("multiply", (0, 0), row, dtype), Node("constant", (), (), dtype, (0.25,))]
    nodes += [Node("add", (2, 3), row, dtype)]
    parts = []
    for name in sorted(UNARY | BINARY):
        operands = (0, 1) if name in BINARY else (4,) if name in POSITIVE else (0,)
        nodes.append(Node(name, operands, row, dtype))
        parts.append(len(nodes) - 1)
    nodes.append(Node("power", (0,), row, dtype, (3,)))
    parts.append(len(nodes) - 1)
    return [*nodes, Node("concat", tuple(parts), (T, width * len(parts)), dtype, (1,))]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [64, 37])
def test_every_function(width, dtype, target, generator, tmp_path):
    check(every_function(dtype, width), target, tmp_path, generator)


def rotation(dtype, interleaved, heads=3, head_dim=32):
    """Heads of a wider projection, rotated: slices, permutations, concatenations."""
    width = 2 * heads * head_dim
    rows, split = (1, T, width), (1, heads, T, head_dim)
    half = (1, heads, T, head_dim // 2)
    step, second = (2, 1) if interleaved else (1, head_dim // 2)
    return [
        Node("input", (), rows, dtype, ("x0",)),
        Node("slice", (0,), (1, T, heads * head_dim), dtype, ((0, 1), (0, 1), (heads * head_dim, 1))),
        Node("reshape", (1,), (1, T, heads, head_dim), dtype),
        Node("permute", (2,), split, dtype, (0, 2, 1, 3)),
        Node("input", (), (1, T, head_dim), dtype, ("x1",)),
        Node("reshape", (4,), (1, 1, T, head_dim), dtype),
        Node("multiply", (3, 5), split, dtype),
        Node("slice", (3,), half, dtype, ((0, 1), (0, 1), (0, 1), (0, step))),
        Node("slice", (3,), half, dtype, ((0, 1), (0, 1), (0, 1), (second, step))),
        Node("negative", (8,), half, dtype),
        *(
            [
                Node("reshape", (9,), (*half, 1), dtype),
                Node("reshape", (7,), (*half, 1), dtype),
                Node("concat", (10, 11), (*half, 2), dtype, (4,)),
                Node("reshape", (12,), split, dtype),
            ]
            if interleaved
            else [Node("concat", (9, 7), split, dtype, (3,))]
        ),
        Node("add", (6, 13 if interleaved else 10), split, dtype),
        Node("permute", (14 if interleaved else 11,), (1, T, heads, head_dim), dtype, (0, 2, 1, 3)),
    ]


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
