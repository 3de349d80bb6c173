"""Candidates are compared before they are timed, and none is preferred that is not faster."""

import json
import subprocess
import sys
from itertools import groupby

import pytest
import torch

from tests.schedules.database.samples import CPU
from vllm_compile.canonical import canonical
from vllm_compile.driver import lower_model
from vllm_compile.schedules.database import Workload
from vllm_compile.schedules.tuning import measure as measuring
from vllm_compile.schedules.tuning.device import Cpu
from vllm_compile.schedules.tuning.extract import tasks_of
from vllm_compile.schedules.tuning.measure import measure, measure_noting
from vllm_compile.schedules.tuning.prepare import call_of
from vllm_compile.targets import resolve


@pytest.fixture(scope="module")
def task(tiny):
    tasks = tasks_of(lower_model(tiny, resolve("cpu")), resolve("cpu"), trials=3)
    return next(task for task in tasks if "model_mlp_down_proj_weight" in task.names)


def test_no_tvm_where_kernels_are_timed():
    """Its thread pool would take the place of OpenMP's; a GPU's machine need not have it."""
    modules = "from vllm_compile.schedules.tuning import built, measure, search"
    code = f"import sys; {modules}; assert 'tvm' not in sys.modules, 'TVM'"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""


def test_a_call_is_read_back_from_its_workload(task, tiny):
    lowered = lower_model(tiny, resolve("cpu"))
    specs = {call_of(json.loads(r.workload.text)) for r in task.ranges}
    assert len(specs) == 1
    assert specs <= lowered.kernels.keys()


def test_which_configuration_is_called_is_noted(task, tmp_path, monkeypatch):
    """Of a crash nothing else is left: before each is compared, and before each is timed."""
    note, called, timed = tmp_path / "note", [], []
    timer = Cpu.timer

    def run(self, call):
        called.append(note.read_text())
        call()

    def watched(self, calls):
        taken = timer(self, calls)

        def first(turn):
            timed.append(note.read_text())
            return taken(turn)

        return first

    monkeypatch.setattr(Cpu, "run", run)
    monkeypatch.setattr(Cpu, "timer", watched)
    measure_noting(task.payload() | {"note": str(note)})
    every = [canonical(c) for r in task.ranges for c in r.configs]
    assert [text for text, _ in groupby(called)] == every
    assert set(timed) == set(every)


def test_a_task_of_a_queue_names_no_file(task, tmp_path):
    measure(task.payload() | {"note": str(tmp_path / "note")})
    assert not list(tmp_path.iterdir())


def test_a_record_of_each_range(task):
    outcome = measure(task.payload())
    assert [record.workload for record in outcome.records] == [r.workload for r in task.ranges]
    for record, summary, wanted in zip(outcome.records, outcome.result, task.ranges, strict=True):
        assert record.schedule.content()["config"] in wanted.configs
        assert summary["tried"] == len(wanted.configs)
        assert summary["wrong"] == []
        assert record.verdict is not None
        assert record.verdict.error <= 1
        assert 0 < record.times.p10 <= record.times.median <= record.times.p90
        assert record.target.kind == "cpu"
        assert record.target.arch


def test_weights_of_another_layout_are_refused(task):
    payload = task.payload()
    text, *rest = payload["ranges"][0]
    other = json.loads(text)
    other["layouts"] = {"weight": "panels1x1"}
    payload["ranges"] = [[json.dumps(other), *rest]]
    with pytest.raises(RuntimeError, match=r"laid out as .*panels1x1"):
        measure(payload)


def test_a_task_for_another_machine_is_refused(task):
    with pytest.raises(RuntimeError, match=r"for another machine"):
        measure(task.payload() | {"machine": CPU.text})


def fake(value, us):
    """A kernel that fills its output with `value`; `us` is how long it says that it takes."""

    def kernel(*arguments):
        torch.from_dlpack(arguments[-1]).copy_(value[: arguments[0].shape[0]])

    kernel.us = us
    return kernel


class Clock(Cpu):
    """Believes kernels, but for one turn in five, when others are at work; how time is measured is tested above."""

    def timer(self, calls):
        return lambda turn: calls[0].func.us * (1 + 9 * (turn % 5 == 3))


@pytest.fixture
def case(monkeypatch):
    """A case whose kernels are Python functions, given by `kernels`."""
    workload = {"op": "linear", "inputs": [], "outputs": [], "attributes": {}, "layouts": {}, "tokens": [1, 2]}

    def make(**kernels):
        made = object.__new__(measuring._Case)
        x, weight, expected = torch.randn(2, 4), torch.randn(3, 4), torch.ones(2, 3)
        made.device = Clock()
        made.description = {
            "family": "cpu.linear",
            "configs": {symbol: {"name": symbol} for symbol in kernels},
            "by_tokens": [True, False],
            "weights": [False, True],
            "row_bytes": 28,
            "tolerance": [1e-3, 1e-3],
            "machine": CPU.text,
        }
        made._inputs, made._expected, made._weight_bytes = [x, weight], expected, weight.nbytes
        made._copies, made._bandwidth = [[x, weight]], 1e9
        made._kernel = {symbol: fake(factor * expected, us) for symbol, (factor, us) in kernels.items()}.__getitem__
        entry = {"workload": Workload.from_text(json.dumps(workload)).text, "tokens": 2, "symbols": list(kernels)}
        return made.fastest(entry)

    return make


def test_the_fastest_that_is_right(case):
    summary, record = case(k0=(1.0, 4.0), wrong=(1.01, 0.1), nothing=(float("nan"), 0.1), fast=(1.0, 1.0))
    assert record.schedule.content()["config"] == {"name": "fast"}
    assert summary["wrong"] == [{"name": "wrong"}, {"name": "nothing"}]
    assert (summary["default_us"], summary["best_us"]) == (4.0, 1.0)


def test_what_is_not_clearly_faster_is_not_preferred(case):
    for us, name in ((3.95, "k0"), (3.9, "other")):
        _, record = case(k0=(1.0, 4.0), other=(1.0, us))
        assert record.schedule.content()["config"] == {"name": name}


def test_a_wrong_default_is_an_error(case):
    with pytest.raises(RuntimeError, match=r"the default .* is wrong"):
        case(k0=(2.0, 1.0), good=(1.0, 1.0))
