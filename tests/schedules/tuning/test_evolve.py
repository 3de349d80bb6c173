"""MetaSchedule proposes, our process measures, the database keeps: no wrong candidate, and none that took it along."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tvm
from tvm.s_tir.meta_schedule.database import TuningRecord

from tests.schedules.database.samples import record
from vllm_compile.cli import main
from vllm_compile.driver import CompileOptions, compile_model, lower_model
from vllm_compile.schedules.database import Provenance, Schedule, Verdict, commit, open_database
from vllm_compile.schedules.database.executors import LocalExecutor, Outcome, TaskCrashedError
from vllm_compile.schedules.database.machine import fingerprint
from vllm_compile.schedules.database.meta_schedule import Assessment, MetaScheduleDatabase
from vllm_compile.schedules.database.store import select_where
from vllm_compile.schedules.design import TRACE, text_of
from vllm_compile.schedules.tuning import evolve
from vllm_compile.schedules.tuning.extract import tasks_of
from vllm_compile.schedules.tuning.measure import TRIAL, trial
from vllm_compile.schedules.tuning.search import pending
from vllm_compile.targets import resolve

CPU = resolve("cpu")


@pytest.fixture(scope="module")
def task(tiny):
    """The down projection, for one token and two; a dozen traces each."""
    lowered = lower_model(tiny, CPU, lossless=False)
    tasks = tasks_of(lowered, CPU, trials=1, traces=12)
    assert not any(r.traces for t in tasks_of(lowered, CPU, trials=1) for r in t.ranges)
    found = next(task for task in tasks if "model_mlp_down_proj_weight" in task.names)
    ends = [json.loads(r.workload.text)["tokens"] for r in found.ranges]
    assert [r.traces for r in found.ranges] == [12 if least == most else 0 for least, most in ends]
    return replace(found, ranges=found.ranges[:2])


def searched(task, database):
    return [evolve.is_searched(task, r, database, fingerprint(CPU)) for r in task.ranges]


def test_from_a_search_to_an_artifact(task, tiny, tmp_path, capsys):
    """The best traces compete with the others; `compile --db` replays a trace, and what it serves is right."""
    url = str(tmp_path / "tuning.db")
    executor = LocalExecutor({TRIAL: trial}, 120)
    with open_database(url) as database:
        try:
            task = replace(task, ranges=(replace(task.ranges[0], traces=evolve.ROUND),))
            found = evolve.evolved(task, database, executor, lambda: False)
        finally:
            executor.close()
        assert [r.configs[0] for r in found.ranges] == [r.configs[0] for r in task.ranges]
        for wanted in found.ranges:
            assert 1 <= len(wanted.configs[1:]) <= evolve.FINALISTS
            assert all(config[TRACE] and config["tokens"] == wanted.tokens for config in wanted.configs[1:])
        kept = [record for record, _ in select_where(database)]
        assert kept
        for record in kept:
            assert record.schedule.kind == "trace"
            assert record.verdict.error <= 1
            assert record.times.median > 0
        # What would be measured next, and which of it is compiled, is a matter of time: here the trace shall win.
        wanted, template = found.ranges[0], kept[0]
        schedule = Schedule.of_family(task.family, wanted.configs[1])
        commit(database, [winner := replace(template, workload=wanted.workload, schedule=schedule)])
    options = CompileOptions(db=url, pack="none")
    done = compile_model(tiny, out=tmp_path / "artifact", options=options)
    assert done.verdict["outcome"] == "pass"
    kernels = json.loads((done.artifact / "manifest.json").read_text())["kernels"]
    (ours,) = [kernel for kernel in kernels if kernel["record"] is not None]
    assert (ours["record"]["id"], ours["config"]) == (winner.id, wanted.configs[1])
    capsys.readouterr()
    assert main(["db", "--db", url, "explain", str(done.artifact)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "runs cpu.linear tokens=1 trace=" in said
    assert "GetSBlock" not in said


class FakeExecutor:
    """Answers as `trial` would; the first candidates that it meets end its process, the next are wrong."""

    def __init__(self, deadly=0, wrong=0):
        self.fates = [TaskCrashedError] * deadly + [2.0] * wrong
        self.met: dict[str, object] = {}  # by trace: its fate, 0.5 of those that are right
        self.deaths = 0

    def run(self, held, lost):
        configs = json.loads((Path(held.payload["folder"]) / "configs.json").read_text())
        for config in configs:
            if config[TRACE] not in self.met:
                self.met[config[TRACE]] = self.fates.pop(0) if self.fates else 0.5
        fates = [self.met[config[TRACE]] for config in configs]
        if TaskCrashedError in fates:
            self.deaths += 1
            raise TaskCrashedError("its process ended with exit code -11")
        about = {"moved_bytes": 1000, "bandwidth": 1e9, "executed_on": "nothing"}
        return Outcome([{"error": error, "us": [3.0, 1.0, 2.0], **about} for error in fates])

    @property
    def right(self):
        return {trace for trace, fate in self.met.items() if fate == 0.5}


@pytest.fixture
def unbuilt(monkeypatch):
    """Nothing is built: the case is its configurations."""

    def prepare(payload, folder):
        ((_, _, configs),) = payload["ranges"]
        (folder / "configs.json").write_text(json.dumps(configs))

    monkeypatch.setattr(evolve, "prepare", prepare)


def test_what_is_wrong_or_deadly_is_not_kept(task, database, unbuilt):
    executor = FakeExecutor(deadly=2, wrong=2)
    task = replace(task, ranges=task.ranges[:1])
    assert searched(task, database) == [False]
    found = evolve.evolved(task, database, executor, lambda: False)
    assert executor.deaths > 2, "together, then alone"
    assert executor.right
    assert len(select_where(database)) == len(executor.right)
    assert {config[TRACE] for config in found.ranges[0].configs[1:]} <= executor.right
    assert searched(task, database) == [True]
    record, _ = select_where(database)[0]
    assert (record.times.median, record.gb_per_s, record.roofline_share) == (2.0, 0.5, 0.5)


def test_a_search_that_was_stopped_goes_on(task, database, unbuilt):
    """What was measured is among the best of the next search."""
    first = FakeExecutor()
    stopped = evolve.evolved(task, database, first, lambda: bool(first.met))
    assert 0 < len(first.met) <= evolve.ROUND
    assert len(stopped.ranges[1].configs) == 1, "there was no time left for it"
    assert searched(task, database) == [True, False]
    again = FakeExecutor(wrong=10**3)
    found = evolve.evolved(replace(task, ranges=task.ranges[:1]), database, again, lambda: False)
    assert {config[TRACE] for config in found.ranges[0].configs[1:]} <= first.right


def test_a_trace_of_another_version_is_passed_over(task, database, unbuilt):
    """However fast it was: it has steps that no space of ours has."""
    task = replace(task, ranges=task.ranges[:1])
    schedule = tvm.s_tir.Schedule(evolve._design(task, task.ranges[0]).module)
    schedule.annotate(schedule.get_sblock("product"), "pragma_import_llvm", "define void @f() { ret void }")
    verdict, about = Verdict(0.0, 1.0, "nothing"), Provenance("somebody", 1, "elsewhere", "0")
    records = MetaScheduleDatabase(database, fingerprint(CPU), lambda record: Assessment(verdict, 1.0, 1.0, about))
    target = tvm.target.Target(CPU.tvm_config())
    workload = records.commit_workload(evolve._design(task, task.ranges[0]).module)
    for seconds in (1e-9, 2e-9, 3e-9, 4e-9):  # more than there are finalists
        records.commit_tuning_record(TuningRecord(schedule.trace, workload, [seconds], target, []))
    executor = FakeExecutor()
    found = evolve.evolved(task, database, executor, lambda: False)
    foreign = text_of(schedule.trace)
    assert foreign not in executor.met
    assert len(found.ranges[0].configs) == 1 + evolve.FINALISTS
    assert {config[TRACE] for config in found.ranges[0].configs[1:]} <= executor.right
    assert executor.right


def test_a_measured_range_waits_for_its_search(task, database, unbuilt):
    commit(database, [record(r.workload, fingerprint(CPU)) for r in task.ranges])

    def state():
        def asked(task, wanted):
            return evolve.is_searched(task, wanted, database, fingerprint(CPU))

        (progress,) = pending(database, [task], fingerprint(CPU), searched=asked)
        return progress.state

    assert state() == "waiting"
    evolve.evolved(task, database, FakeExecutor(), lambda: False)
    assert state() == "known"
