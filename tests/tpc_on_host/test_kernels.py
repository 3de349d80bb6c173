"""Generated TPC-C, executed: results are the references', over odd sizes and cuts of the index space."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tpc_on_host import runner
from vllm_compile.expression import BINARY, Node
from vllm_compile.ops import ADD_RMS_NORM, ELEMENTWISE, LAYER_NORM, QKV_ROPE_CACHE, RMS_NORM, SILU_MUL
from vllm_compile.ops.qkv_rope_cache import rotate
from vllm_compile.schedules.gaudi import expressions
from vllm_compile.schedules.gaudi.expressions import Fused
from vllm_compile.schedules.gaudi.tpc import generate
from vllm_compile.spec import OpSpec, Sym, TensorSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
both_dtypes = pytest.mark.parametrize("dtype", list(DTYPES))


def spec_of(op: str, inputs: dict[str, torch.Tensor], attributes: dict) -> OpSpec:
    def tensor(value: torch.Tensor) -> TensorSpec:
        shape = (Sym.TOKENS, *value.shape[1:]) if value.dim() > 1 else tuple(value.shape)
        return TensorSpec(shape, str(value.dtype).removeprefix("torch."))

    named = tuple((name, tensor(value)) for name, value in inputs.items())
    return OpSpec(op, named, (), tuple(attributes.items()))


def check(fused: Fused, inputs: dict[str, torch.Tensor], expected, tolerance, folder) -> runner.HostKernel:
    kernel = generate(fused)
    assert kernel is not None
    host = runner.build(kernel, folder)
    order = [access.name for access in kernel.inputs]
    for piece in (1, 3):
        results = host([inputs[name] for name in order], piece)
        for result, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(
                result.reshape(wanted.shape), wanted, rtol=tolerance.rtol, atol=tolerance.atol, msg=tolerance.reason
            )
    return host


@both_dtypes
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 63), (5, 200), (2, 257)])
@pytest.mark.parametrize("op", [RMS_NORM, ADD_RMS_NORM], ids=lambda op: op.name)
def test_rms_norm(op, tokens, width, dtype, generator, tmp_path):
    inputs, attributes = op.sample(generator, DTYPES[dtype], tokens, width)
    expected = op.reference(**inputs, **attributes)
    expected = expected if isinstance(expected, tuple) else (expected,)
    check(expressions.rms_norm(spec_of(op.name, inputs, attributes)), inputs, expected, op.tolerance[dtype], tmp_path)


@both_dtypes
def test_layer_norm(dtype, generator, tmp_path):
    inputs, attributes = LAYER_NORM.sample(generator, DTYPES[dtype], 3, 256)
    expected = (LAYER_NORM.reference(**inputs, **attributes),)
    fused = expressions.layer_norm(spec_of("layer_norm", inputs, attributes))
    check(fused, inputs, expected, LAYER_NORM.tolerance[dtype], tmp_path)


def test_no_layer_norm_of_a_width_whose_tail_would_count(generator):
    inputs, attributes = LAYER_NORM.sample(generator, torch.float32, 3, 100)
    assert generate(expressions.layer_norm(spec_of("layer_norm", inputs, attributes))) is None


@both_dtypes
@pytest.mark.parametrize(("tokens", "width"), [(1, 65), (4, 130)])
def test_silu_mul(tokens, width, dtype, generator, tmp_path):
    inputs, _ = SILU_MUL.sample(generator, DTYPES[dtype], tokens, width)
    expected = (SILU_MUL.reference(**inputs),)
    check(expressions.silu_mul(width, dtype), inputs, expected, SILU_MUL.tolerance[dtype], tmp_path)


@both_dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 6), (4, 2, 128), (2, 2, 200)])
def test_rotation(heads, kv_heads, head_dim, dtype, generator, tmp_path):
    inputs, _ = QKV_ROPE_CACHE.sample(generator, DTYPES[dtype], 5, heads, kv_heads, head_dim)
    q_and_k = inputs["qkv"].view(5, -1, head_dim)[:, : heads + kv_heads]
    expected = (rotate(q_and_k, inputs["cos"], inputs["sin"]),)
    fused = expressions.rotate(heads + kv_heads, heads + 2 * kv_heads, head_dim, dtype)
    host = check(fused, inputs, expected, QKV_ROPE_CACHE.tolerance[dtype], tmp_path)
    wrong = host([inputs["qkv"], inputs["sin"], inputs["cos"]])[0]
    assert not torch.allclose(wrong.reshape(expected[0].shape), expected[0], rtol=0.05)


def unary_chain(op: str, dtype: str) -> tuple[Node, ...]:
    """op(x * w) * 0.3 for x [T, 70]"""
    row = (Sym.TOKENS, 70)
    return (
        Node("input", (), row, dtype, ("x",)),
        Node("input", (), (70,), dtype, ("w",)),
        Node("multiply", (0, 1), row, dtype),
        Node(op, (2,), row, dtype, (3,) if op == "power" else ()),
        Node("constant", (), (), dtype, (0.3,)),
        Node("multiply", (3, 4), row, dtype),
    )


@both_dtypes
@pytest.mark.parametrize(
    "op", ["abs", "exp", "gelu_tanh", "negative", "power", "relu", "sigmoid", "silu", "square", "tanh"]
)
def test_elementwise(op, dtype, generator, tmp_path):
    nodes = unary_chain(op, dtype)
    inputs = {"x": torch.randn(3, 70, generator=generator), "w": torch.randn(70, generator=generator)}
    inputs = {name: value.to(DTYPES[dtype]) for name, value in inputs.items()}
    expected = (ELEMENTWISE.reference(nodes, **inputs),)
    once = ELEMENTWISE.tolerance[dtype]
    twice = replace(
        once, rtol=2 * once.rtol, reason="the operator's value may be rounded to its neighbour, and the product"
    )
    check(Fused(nodes, (5,)), inputs, expected, twice, tmp_path)


@both_dtypes
@pytest.mark.parametrize(
    "op",
    ["sqrt", "rsqrt", "divide", "maximum", "minimum", "subtract"],
)
def test_elementwise_of_numbers_above_zero(op, dtype, generator, tmp_path):
    """op(x) or op(x, w) for x [T, 70], w [70]"""
    row = (Sym.TOKENS, 70)
    nodes = (
        Node("input", (), row, dtype, ("x",)),
        Node("input", (), (70,), dtype, ("w",)),
        Node(op, (0, 1) if op in BINARY else (0,), row, dtype),
        Node("add", (2, 1), row, dtype),
    )
    inputs = {"x": torch.rand(3, 70, generator=generator) + 0.1, "w": torch.rand(70, generator=generator) + 0.1}
    inputs = {name: value.to(DTYPES[dtype]) for name, value in inputs.items()}
    expected = (ELEMENTWISE.reference(nodes, **inputs),)
    once = ELEMENTWISE.tolerance[dtype]
    check(Fused(nodes, (3,)), inputs, expected, replace(once, rtol=2 * once.rtol), tmp_path)


def test_a_power_is_rounded_once(generator):
    """Where torch's own, of bfloat16, rounds each product."""
    x = torch.randn(3, 70, generator=generator).bfloat16()
    expected = (x.double() ** 3).bfloat16()
    assert not torch.equal(x**3, expected)
    nodes = (
        Node("input", (), (Sym.TOKENS, 70), "bfloat16", ("x",)),
        Node("power", (0,), (Sym.TOKENS, 70), "bfloat16", (3,)),
    )
    assert torch.equal(ELEMENTWISE.reference(nodes, x=x), expected)


def test_a_mean_is_rounded_where_the_expression_is(generator, tmp_path):
    """x - mean(x) for x of about 100, where bfloat16 has steps of 0.5: the mean of 67 of them is never in between."""
    row = (Sym.TOKENS, 67)
    nodes = (
        Node("input", (), row, "bfloat16", ("x",)),
        Node("mean", (0,), (Sym.TOKENS, 1), "bfloat16"),
        Node("subtract", (0, 1), row, "bfloat16"),
    )
    x = (100 + torch.randn(5, 67, generator=generator)).bfloat16()
    expected = x - x.double().mean(-1, keepdim=True).bfloat16()
    assert torch.equal(ELEMENTWISE.reference(nodes, x=x), expected)
    check(Fused(nodes, (2,)), {"x": x}, (expected,), ELEMENTWISE.tolerance["bfloat16"], tmp_path)


@both_dtypes
def test_the_operators_own_sample(dtype, generator, tmp_path):
    inputs, attributes = ELEMENTWISE.sample(generator, DTYPES[dtype])
    nodes = attributes["expression"]
    expected = (ELEMENTWISE.reference(nodes, **inputs),)
    check(Fused(nodes, (len(nodes) - 1,)), inputs, expected, ELEMENTWISE.tolerance[dtype], tmp_path)


def test_permuted_heads_and_every_second_one(generator, tmp_path):
    """x [T, 4, 5, 6] -> its axes 1 and 2 exchanged, then every second place of the last but one."""
    nodes = (
        Node("input", (), (Sym.TOKENS, 4, 5, 6), "float32", ("x",)),
        Node("permute", (0,), (Sym.TOKENS, 5, 4, 6), "float32", (0, 2, 1, 3)),
        Node("slice", (1,), (Sym.TOKENS, 5, 2, 6), "float32", ((0, 1), (0, 1), (1, 2), (0, 1))),
        Node("exp", (2,), (Sym.TOKENS, 5, 2, 6), "float32"),
    )
    inputs = {"x": torch.randn(3, 4, 5, 6, generator=generator)}
    expected = (ELEMENTWISE.reference(nodes, **inputs),)
    check(Fused(nodes, (3,)), inputs, expected, ELEMENTWISE.tolerance["float32"], tmp_path)


@pytest.mark.parametrize(
    "nodes",
    [
        unary_chain("gelu", "float32"),  # the error function
        (  # columns are cut
            Node("input", (), (Sym.TOKENS, 8), "float32", ("x",)),
            Node("slice", (0,), (Sym.TOKENS, 4), "float32", ((0, 1), (4, 1))),
        ),
        (  # two dtypes
            Node("input", (), (Sym.TOKENS, 8), "bfloat16", ("x",)),
            Node("cast", (0,), (Sym.TOKENS, 8), "float32"),
        ),
    ],
)
def test_what_has_no_kernel(nodes):
    assert generate(Fused(nodes, (len(nodes) - 1,))) is None


class TestTampered:
    """The checks find what they are for."""

    @pytest.fixture
    def fused(self):
        return expressions.silu_mul(130, "bfloat16")

    @pytest.fixture
    def x(self, generator):
        return torch.randn(4, 2, 130, generator=generator).bfloat16()

    @staticmethod
    def replace(name, old, new):
        def change(files):
            assert old in files[name]
            return files | {name: files[name].replace(old, new, 1)}

        return change

    def test_an_access_pattern_that_is_too_small(self, fused, x, tmp_path):
        kernel = generate(fused)
        change = self.replace(
            "glue.cpp",
            "span(kernel->inputTensorAccessPattern[0], 1, 1, 1, 0, 1)",
            "span(kernel->inputTensorAccessPattern[0], 1, 1, 1, 0, 0)",
        )
        with pytest.raises(RuntimeError, match="beyond the access pattern"):
            runner.build(kernel, tmp_path, change)([x])

    def test_an_index_space_that_is_too_small(self, fused, x, tmp_path):
        change = self.replace("glue.cpp", "indexSpaceGeometry[0] = 2", "indexSpaceGeometry[0] = 1")
        (result,) = runner.build(generate(fused), tmp_path, change)([x])
        assert result.isnan().any()

    def test_a_wrong_operator(self, fused, x, tmp_path):
        change = self.replace("kernel_0_t1.c", "(float64)1.0f + v_exp", "(float64)1.0f - v_exp")
        (result,) = runner.build(generate(fused), tmp_path, change)([x])
        assert not torch.allclose(result[:, 0], SILU_MUL.reference(x.flatten(1)), rtol=0.05)

    def test_a_tensor_of_another_width(self, fused, x, tmp_path):
        change = self.replace("glue.cpp", "maxSizes[0] != 130", "maxSizes[0] != 131")
        with pytest.raises(RuntimeError, match="the glue code refuses"):
            runner.build(generate(fused), tmp_path, change)([x])
