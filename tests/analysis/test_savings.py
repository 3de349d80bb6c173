"""Differences between modules, on the operators of a small Llama."""

from __future__ import annotations

import pytest

from vllm_compile.analysis.cost import Workload
from vllm_compile.analysis.graph import calls
from vllm_compile.analysis.savings import Stage, Step, fusion_savings, run_in_step
from vllm_compile.relax_passes.pipeline import run_passes
from vllm_compile.targets.cuda import H200


@pytest.fixture(scope="module")
def stages(pairs) -> list[Stage]:
    found: list[Stage] = []
    run_passes(pairs("two layers").imported.module, lambda name, module: found.append(Stage(name, calls(module))))
    return found


@pytest.mark.parametrize("workload", [Workload(1, 1, 30), Workload(2, 20, 0)])
def test_nothing_is_lost_between_the_rows(stages, workload):
    """All rows but what merging weights would cost are the difference between the first module and the last."""
    step = Step(workload, "float32", H200)
    savings = fusion_savings(stages, step)
    first, last = (step.total(run_in_step(stage.calls)) for stage in (stages[0], stages[-1]))
    merged = step.total(call for call in stages[-3].calls if call.once)
    assert stages[-2].name == "lift_weights"
    assert merged.launches == 4, "q, k, v and gate, up of two layers"
    assert sum(saving.kernels for saving in savings) == first.launches - last.launches + merged.launches
    assert sum(saving.bytes for saving in savings) == first.cost.bytes - last.cost.bytes + merged.cost.bytes
    seconds = first.time.total - last.time.total + merged.time.total
    assert sum(saving.seconds for saving in savings) == pytest.approx(seconds)


def test_a_pass_that_matches_nothing_saves_nothing(stages):
    named = {saving.what for saving in fusion_savings(stages, Step(Workload(1, 1, 30), "float32", H200))}
    assert named.isdisjoint({"fuse_layer_norm", "fuse_elementwise"})
    doubled = [*stages, Stage("nothing", stages[-1].calls)]
    assert "nothing" not in {s.what for s in fusion_savings(doubled, Step(Workload(1, 1, 30), "float32", H200))}
