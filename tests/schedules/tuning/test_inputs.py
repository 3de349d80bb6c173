"""What candidates are compared on: the same from a seed, each time, and the operator's own results."""

import json
import secrets

import pytest
import torch
from torch.nn import functional

from vllm_compile.lossless import unpack
from vllm_compile.ops import OPS
from vllm_compile.products import ROWS
from vllm_compile.schedules.database import Workload
from vllm_compile.schedules.family import KernelFamily
from vllm_compile.schedules.select import FAMILIES, choose
from vllm_compile.schedules.tuning.extract import METHODS
from vllm_compile.schedules.tuning.inputs import LAYOUTS, REFERENCES, described, layouts_of, make, spec_of
from vllm_compile.schedules.tuning.task import MEASURE
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets import resolve

CPU = torch.device("cpu")
N, K, TOKENS = 64, 128, 5


def call(op, *more, width=N):
    def tensor(*shape):
        return TensorSpec(shape, "bfloat16")

    inputs = {"x": tensor(Sym.TOKENS, K), "weight": tensor(N, K), "bias": tensor(N), "residual": tensor(Sym.TOKENS, N)}
    names = ("x", "weight", *more)
    return OpSpec(op, tuple((name, inputs[name]) for name in names), (tensor(Sym.TOKENS, width),))


@pytest.fixture
def seed():
    seed = secrets.randbits(32)
    print("seed", seed)
    return seed


CALLS = (call("linear"), call("linear", "bias", "residual"), call("gate_up_silu", width=N // 2))


@pytest.mark.parametrize("spec", CALLS, ids=["linear", "bias, residual", "gate_up_silu"])
def test_the_operators_result(spec, seed):
    """In float64 it is nearer to the sums of any order than what is allowed; of another call's inputs it is not."""
    inputs, expected = make(spec, {}, TOKENS, seed, CPU)
    again = make(spec, {}, TOKENS, seed, CPU)[1]
    assert torch.equal(expected, again)
    op = OPS[spec.op]
    named = dict(zip((name for name, _ in spec.inputs), inputs, strict=True))
    tolerance = op.tolerance["bfloat16"]

    def error(ours):
        difference = (ours.double() - expected.double()).abs()
        return (difference / (tolerance.atol + tolerance.rtol * expected.double().abs())).max().item()

    assert error(op.reference(**named)) < 1
    assert error(op.reference(**named | {"weight": named["weight"].roll(1, 1)})) > 1
    assert error(make(spec, {}, TOKENS, seed + 1, CPU)[1]) > 1


@pytest.mark.parametrize("spec", CALLS, ids=["linear", "bias, residual", "gate_up_silu"])
def test_the_result_is_torchs_own(spec, seed):
    """Written out again in float64, without the roundings to bf16 in between.

    Each is of 2 ** -9; silu makes that of a gate some four times larger.
    """
    inputs, expected = make(spec, {}, TOKENS, seed, CPU)
    x, weight, *more = (tensor.double() for tensor in inputs)
    if spec.op == "gate_up_silu":
        gate, up = functional.linear(x, weight).chunk(2, dim=-1)
        terms = [functional.silu(gate) * up]
    else:
        bias, residual = more or (torch.zeros(N).double(), torch.zeros(TOKENS, N).double())
        terms = [functional.linear(x, weight, bias), residual]
    size = sum(term.abs() for term in terms) + 1e-2
    assert ((expected.double() - sum(terms)).abs() / size).max() < 4 * 2.0**-8
    assert ((expected.double() - terms[-1].roll(1, 1)).abs() / size).max() > 4 * 2.0**-8


def test_large_weights_are_widened_in_parts(seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(2, 4, generator=generator), torch.randn(2 * ROWS + 3, 4, generator=generator)
    torch.testing.assert_close(REFERENCES["linear"](x, weight, wide=torch.float64), x @ weight.T)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_weights_as_kernels_read_them(name, seed):
    """A case says how they are laid out without TVM; what the layout keeps is what the result is of."""
    target = resolve(name)
    for spec in CALLS:
        layouts = choose(spec, target).layouts
        told = json.loads(json.dumps(described(layouts)))
        assert layouts_of(told) == layouts
        (plain, expected), (packed, same) = (make(spec, kinds, TOKENS, seed, CPU) for kinds in ({}, layouts_of(told)))
        assert torch.equal(expected, same)
        assert torch.equal(packed[1], layouts["weight"].pack(plain[1]))
        if name == "cuda":
            assert torch.equal(unpack(packed[1], N, K), plain[1])


def test_a_call_is_read_back_without_tvm():
    for spec in CALLS:
        workload = Workload.of_call(spec, {}, (1, 8))
        assert spec_of(json.loads(workload.text)) == spec


def test_every_family_that_is_measured_can_be_compared():
    """Its operator is one of `REFERENCES`, and they are the operators' own definitions; so are its layouts known."""
    measured = [f for name, method in METHODS.items() if method == MEASURE for f in FAMILIES[name]]
    tuned = {family.op for family in measured if type(family).space is not KernelFamily.space}
    assert tuned
    assert tuned <= REFERENCES.keys()
    assert all(OPS[op].reference is REFERENCES[op] for op in REFERENCES)
    layouts = (f.layouts(s, resolve("cpu")) for f in FAMILIES["cpu"] for s in CALLS if f.op == s.op)
    assert {type(layout) for named in layouts for layout in named.values()} <= set(LAYOUTS.values())
