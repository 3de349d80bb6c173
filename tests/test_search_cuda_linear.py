"""The search over CUDA's linear kernels: what it finds in a plan, and how it changes one.  No GPU is needed."""

import json
import sys
from pathlib import Path

import pytest

from tests import models
from vllm_compile.driver import lower_model
from vllm_compile.runtime.plan import ModelShape, Plan, kernel_steps
from vllm_compile.targets import resolve

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from search_cuda_linear import RECORDS, linear_calls, read_records, with_kernel, write_records


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
