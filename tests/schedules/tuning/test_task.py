"""What is extracted from a model to be tuned."""

import pytest

from vllm_compile.driver import lower_model
from vllm_compile.schedules.select import FAMILIES
from vllm_compile.schedules.tuning.extract import tasks_of
from vllm_compile.targets import resolve


@pytest.fixture(scope="module")
def lowered(tiny):
    return lower_model(tiny, resolve("cpu"))


def test_each_call_once_with_its_weights(lowered):
    tasks = tasks_of(lowered, resolve("cpu"), trials=8)
    calls = {name: task.calls for task in tasks for name in task.names}
    assert calls["model_mlp_down_proj_weight"] == 2, "one a layer"
    assert calls["lm_head_weight"] == 1
    assert [task.step_bytes for task in tasks] == sorted((task.step_bytes for task in tasks), reverse=True)


def test_ranges_are_those_that_compile_asks_for(lowered):
    """The default comes first; each range has no more than `trials` configurations, all of them admitted."""
    target = resolve("cpu")
    for task in tasks_of(lowered, target, trials=8):
        family = next(f for f in FAMILIES["cpu"] if f.name == task.family)
        (kernels,) = (k for k in lowered.kernels.values() if k.symbols[0] in _symbols(lowered, task.names))
        for wanted, variant in zip(task.ranges, kernels.choice.variants, strict=True):
            assert wanted.configs[0] == variant.config
            assert 1 < len(wanted.configs) <= 8
            assert all(family.admits(kernels.spec, c, variant.min_tokens, target) for c in wanted.configs[1:])
            assert f" tokens {variant.min_tokens}-" in wanted.workload.summary()
            assert wanted.tokens >= variant.min_tokens
    whole = tasks_of(lowered, target, trials=10**6)
    assert sum(len(t.configs()) for t in whole) > sum(len(t.configs()) for t in tasks_of(lowered, target, trials=8))


def test_less_of_a_task_keeps_the_defaults(lowered):
    task = tasks_of(lowered, resolve("cpu"), trials=8)[0]
    kept = task.configs()[:3]
    less = task.only(kept)
    assert less.configs() == kept
    assert [r.configs[0] for r in less.ranges] == [r.configs[0] for r in task.ranges]


def _symbols(lowered, names):
    """First symbols of the steps that read a weight of these names."""
    steps = [step for function in lowered.functions.values() for step in function.steps if hasattr(step, "variants")]
    return {s.variants[0][1] for s in steps for a in s.arguments if a.buffer.partition(".")[0] in names}
