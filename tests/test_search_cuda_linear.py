"""The search over CUDA's linear kernels: what it finds in a plan, and how it changes one.  No GPU is needed."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import models
from vllm_compile.driver import lower_model
from vllm_compile.runtime.plan import ModelShape, Plan, kernel_steps
from vllm_compile.schedules.cuda import records
from vllm_compile.targets import resolve

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import search_cuda_linear
from search_cuda_linear import (
    FINALISTS,
    RECORDS,
    identity,
    linear_calls,
    read_records,
    search,
    searched,
    with_kernel,
    write_records,
)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cuda") / "model"
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_attention_heads": 4}
    models.save(directory, 1, dtype="bfloat16", num_key_value_heads=2, **sizes)
    lowered = lower_model(directory, resolve("cuda"))
    return Plan(ModelShape(2, 4, 2, 64, 256, 64, 128, "bfloat16"), lowered.functions, lowered.restored)


def test_calls_are_those_of_a_step(plan):
    calls = {call.name: call.count for call in linear_calls(plan)}
    assert calls["linear_512_256_lossless_from"] == 2, "qkv, one a layer"
    assert calls["linear_residual_256_512_lossless_from"] == 2, "down"
    assert calls["gate_up_silu_1024_256_lossless_from"] == 2


def test_another_kernel_for_one_call_alone(plan):
    call = linear_calls(plan)[0]
    changed = with_kernel(plan, call.spec, 9, "candidate")
    pairs = list(zip(kernel_steps(plan.functions), kernel_steps(changed.functions), strict=True))
    different = [(before, after) for (_, before), (_, after) in pairs if before != after]
    assert len(different) == call.count
    for before, after in different:
        assert dict(after.variants) == dict(before.variants) | {9: "candidate"}
        assert after.large.min_tokens > 16


def test_a_vendor_takes_over(plan):
    call = linear_calls(plan)[0]
    changed = with_kernel(plan, call.spec, 9, None)
    (after,) = {step for _, step in kernel_steps(changed.functions)} - {s for _, s in kernel_steps(plan.functions)}
    assert after.large.min_tokens == 9
    assert [least for least, _ in after.variants] == [1], "none is left that would serve again"


@pytest.mark.parametrize(("vendors", "kept"), [(99, "b"), (1, None)])
def test_what_is_fastest_after_a_second_is_kept(plan, monkeypatch, vendors, kept):
    """Of each shape what was fastest at first is timed as long: of a's, `a` alone, though `a slower` would win."""
    call, program = linear_calls(plan)[0], SimpleNamespace(plan=plan)
    program.set_plan = lambda changed: setattr(program, "plan", changed)
    shape = {"kind": "stream", "row_tiles": 1, "stages": 2, "lossless": True}
    configs = {"a slower": shape, "a": shape | {"stages": 3}, "b": shape | {"row_tiles": 2}}
    sustained = []

    def kernel() -> str | None:
        (step,) = {step for _, step in kernel_steps(program.plan.functions)} - {
            step for _, step in kernel_steps(plan.functions)
        }
        return dict(step.variants).get(9) if step.large.min_tokens > 9 else None

    def timed_for_long(program, contexts):
        sustained.append(kernel())
        return {"a": 30, "b": 20, "a slower": 10, None: vendors}[kernel()]

    monkeypatch.setattr(search_cuda_linear, "step_us", lambda *_, replays: {"a": 5, "b": 6, "a slower": 7}[kernel()])
    monkeypatch.setattr(search_cuda_linear, "sustained_us", timed_for_long)
    monkeypatch.setattr(search_cuda_linear, "chip", lambda: "h200")
    found = search(program, call, 9, list(configs), configs)
    assert sorted(map(str, sustained)) == ["None", "a", "b"]
    assert found["config"] == configs["b"]
    assert found["gain_us"] == round((vendors - 20) / call.count, 2)
    assert kernel() == kept


@pytest.mark.parametrize(("given", "most"), [([], FINALISTS), ([3], 3)])
def test_few_shapes_are_timed_for_long(plan, monkeypatch, given, most):
    call, program = linear_calls(plan)[0], SimpleNamespace(plan=plan, set_plan=lambda changed: None)
    configs = {str(i): {"kind": "stream", "row_tiles": i, "lossless": True} for i in range(FINALISTS + 4)}
    timed = iter(range(1, 100))
    monkeypatch.setattr(search_cuda_linear, "step_us", lambda *_, replays: next(timed))
    monkeypatch.setattr(search_cuda_linear, "sustained_us", lambda *_: next(timed))
    monkeypatch.setattr(search_cuda_linear, "chip", lambda: "h200")
    found = search(program, call, 9, list(configs), configs, *given)
    assert found["config"] == configs["0"]
    assert next(timed) == len(configs) + most + 2, "of all shapes but the slowest, and of the vendor's product"


def test_what_has_no_record_is_searched(plan):
    calls = linear_calls(plan)
    assert searched(plan, [1, 33], [], "h200") == [(call, least) for least in (1, 33) for call in calls]
    known = [identity("h200", calls[0], 33), identity("h100", calls[1], 33), identity("h200", calls[2], 1)]
    assert searched(plan, [33], known, "h200") == [(call, 33) for call in calls[1:]]
    for call in calls:
        wanted = ("h200", *records.key(call.spec, call.packed, 33))
        assert tuple(identity("h200", call, 33).values()) == wanted


def test_records_of_an_older_form_are_one_line_before_the_search(tmp_path):
    path = tmp_path / "records.json"
    assert read_records(path) == []
    known = read_records(RECORDS)
    write_records(path, known[:2])
    write_records(path, [known[1] | {"gain_us": -1.0}, known[2]])
    assert read_records(path) == [known[0], known[1] | {"gain_us": -1.0}, known[2]]
    path.write_text(json.dumps([known[0], {name: value for name, value in known[1].items() if name != "chip"}]))
    with pytest.raises(SystemExit, match=r"records\.json: record 2 has no chip") as caught:
        read_records(path)
    assert "\n" not in str(caught.value)
