"""Elementwise expressions on ROCm, as a CPU emulates them: every function, every change of an index."""

import pytest
import torch

from tests.rocm_on_host import needs_opencl
from tests.rocm_on_host.runner import OnHost
from vllm_compile.ops import ELEMENTWISE
from vllm_compile.schedules.select import choose
from vllm_compile.targets.rocm import for_arch

from . import harness
from .expressions import T, every_function, inputs_of, rotation, spec_of, weighted_sum

pytestmark = needs_opencl
TARGET = for_arch()
CASES = {
    "every function of bfloat16, in vectors": every_function("bfloat16", 64),
    "every function of float32, one by one": every_function("float32", 37),
    "rotation": rotation("bfloat16", interleaved=False),
    "interleaved rotation of odd heads": rotation("bfloat16", interleaved=True, head_dim=20),
    "weighted sum": weighted_sum(2048 + 8),
}


@pytest.fixture(params=CASES)
def case(request, generator):
    nodes = CASES[request.param]
    return spec_of(nodes), inputs_of(nodes, generator, 5), {"expression": tuple(nodes)}


def run(on_host, spec, inputs, tokens):
    (out,) = harness.poisoned(spec, tokens)
    return out, on_host.run("k", *inputs.values(), out)


def test_matches_reference(case, tmp_path):
    """A row alone is the same to the last bit; another input is seen."""
    spec, inputs, attributes = case
    kernel = choose(spec, TARGET).family.build(spec, {}, TARGET)
    on_host = OnHost({"k": kernel}, TARGET, tmp_path)
    (expected,) = harness.results(ELEMENTWISE, inputs, attributes)
    out, _ = run(on_host, spec, inputs, 5)
    harness.assert_matches(ELEMENTWISE, (out,), (expected.view_as(out),))
    rows = {name: x[3:4] if T in dict(spec.inputs)[name].shape else x for name, x in inputs.items()}
    assert torch.equal(run(on_host, spec, rows, 1)[0][0], out[3])
    assert not run(on_host, spec, {name: x[:0] if len(x) == 5 else x for name, x in inputs.items()}, 0)[1]
    changed = {**inputs, "x0": inputs["x0"] + 1}
    with pytest.raises(AssertionError):
        harness.assert_matches(ELEMENTWISE, (run(on_host, spec, changed, 5)[0],), (expected.view_as(out),))
