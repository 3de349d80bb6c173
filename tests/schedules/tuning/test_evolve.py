"""MetaSchedule proposes, our process measures, the database keeps: no wrong candidate, and none that took it along."""

import json
import re
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import tvm
from tvm.s_tir.meta_schedule.database import TuningRecord

from tests import models
from tests.conftest import SEED
from tests.schedules.database.samples import record
from vllm_compile.cli import main
from vllm_compile.driver import CompileOptions, compile_model, lower_model
from vllm_compile.schedules.database import Provenance, Schedule, Times, Verdict, Workload, commit, open_database
from vllm_compile.schedules.database.executors import LocalExecutor, Outcome, TaskCrashedError, TaskFailedError
from vllm_compile.schedules.database.machine import fingerprint
from vllm_compile.schedules.database.meta_schedule import Assessment, MetaScheduleDatabase
from vllm_compile.schedules.database.searches import search_of
from vllm_compile.schedules.database.store import select_where
from vllm_compile.schedules.design import SPACE, TRACE, Design, text_of
from vllm_compile.schedules.tuning import evolve
from vllm_compile.schedules.tuning.extract import problem_of, tasks_of
from vllm_compile.schedules.tuning.measure import TRIAL, trial
from vllm_compile.schedules.tuning.search import pending, tune
from vllm_compile.targets import resolve

CPU = resolve("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One whose MLP has whole panels only."""
    directory = tmp_path_factory.mktemp("evolve") / "model"
    models.save(directory, SEED, intermediate_size=96, num_hidden_layers=1)
    return directory


@pytest.fixture(scope="module")
def tasks(model):
    lowered = lower_model(model, CPU, lossless=False)
    assert not any(r.traces for t in tasks_of(lowered, CPU, trials=1) for r in t.ranges)
    return tasks_of(lowered, CPU, trials=1, traces=12)


@pytest.fixture(scope="module")
def task(tasks):
    """The down projection, for one token and two; a dozen traces each."""
    found = next(task for task in tasks if "model_mlp_down_proj_weight" in task.names)
    ends = [json.loads(r.workload.text)["tokens"] for r in found.ranges]
    assert [r.traces for r in found.ranges] == [12 if least == most else 0 for least, most in ends]
    return replace(found, ranges=found.ranges[:2])


def searched(task, database):
    return [evolve.is_searched(task, r, database, fingerprint(CPU)) for r in task.ranges]


def test_from_a_search_to_an_artifact(tasks, task, model, tmp_path, capsys):
    """The best traces compete with the others; `compile --db` replays them, and what it serves is right."""
    url, winners = str(tmp_path / "tuning.db"), {}
    executor = LocalExecutor({TRIAL: trial}, 120)
    gates = next(t for t in tasks if t.family == "cpu.gate_up_silu")
    with open_database(url) as database:
        try:
            for each in (gates, task):
                one = replace(each, ranges=(replace(each.ranges[0], traces=evolve.ROUND),))
                found, _ = evolve.evolved(one, database, executor, lambda: False)
                kept = [record for record, _ in select_where(database) if "module" in record.workload.text]
                (wanted,) = found.ranges
                assert wanted.configs[0] == one.ranges[0].configs[0]
                assert 1 <= len(wanted.configs[1:]) <= evolve.FINALISTS
                assert all(config[TRACE] and config["tokens"] == wanted.tokens for config in wanted.configs[1:])
                # What would be measured next, and which of it is compiled, is a matter of time: the trace shall win.
                schedule = Schedule.of_family(each.family, wanted.configs[1])
                winner = replace(kept[0], workload=wanted.workload, schedule=schedule)
                commit(database, [winner])
                winners[winner.id] = wanted.configs[1]
        finally:
            executor.close()
        assert kept
        for record in kept:
            assert record.schedule.kind == "trace"
            assert record.verdict.error <= 1
            assert record.times.median > 0
        # One of a space that has changed since is passed over, however fast it was.
        old = Schedule.of_family(task.family, {**wanted.configs[-1], SPACE: "0" * 64})
        faster = {name: value / 1e3 for name, value in vars(winner.times).items()}
        commit(database, [stale := replace(winner, schedule=old, times=Times(**faster))])
    options = CompileOptions(db=url, pack="none")
    done = compile_model(model, out=tmp_path / "artifact", options=options)
    assert done.verdict["outcome"] == "pass"
    kernels = json.loads((done.artifact / "manifest.json").read_text())["kernels"]
    ours = [kernel for kernel in kernels if kernel["record"] is not None]
    assert {kernel["record"]["id"]: kernel["config"] for kernel in ours} == winners
    assert {kernel["family"] for kernel in ours} == {"cpu.linear", "cpu.gate_up_silu"}
    assert [kernel["passed_over"]["id"] for kernel in kernels if kernel["passed_over"]] == [stale.id]
    capsys.readouterr()
    assert main(["db", "--db", url, "explain", str(done.artifact)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "runs cpu.linear space=" in said
    passed = f"record {stale.id[:12]}: the space of schedules that it is of has changed since"
    assert re.search(rf"passed over: cpu.linear by trace, measured on .* by .* µs, {passed}", said)
    assert "GetSBlock" not in said


class FakeExecutor:
    """Answers as `trial` would; the first candidates that it meets end its process, the next are wrong.

    `broken`: as the machine breaks down, everything from so many candidates on ends it, the default too.
    """

    def __init__(self, deadly=0, wrong=0, broken=10**9):
        self.broken = broken
        self.fates = [TaskCrashedError] * deadly + [2.0] * wrong
        self.met: dict[str, object] = {}  # by trace: its fate, 0.5 of those that are right
        self.deaths = 0

    def run(self, held, lost):
        configs = json.loads((Path(held.payload["folder"]) / "configs.json").read_text())
        for config in configs:
            if TRACE in config and config[TRACE] not in self.met:
                self.met[config[TRACE]] = self.fates.pop(0) if self.fates else 0.5
        fates = [self.met.get(config.get(TRACE), 0.5) for config in configs]
        if TaskCrashedError in fates or len(self.met) >= self.broken:
            self.deaths += 1
            raise TaskCrashedError("its process ended with exit code -11")
        about = {"moved_bytes": 1000, "bandwidth": 1e9, "executed_on": "nothing"}
        return Outcome([{"error": error, "us": [3.0, 1.0, 2.0], **about} for error in fates])

    @property
    def right(self):
        return {trace for trace, fate in self.met.items() if fate == 0.5}


class FakeMeasure:
    """Answers as `measure` would, with the last configuration as the best; or nothing can be measured."""

    def __init__(self, failing):
        self.failing = failing

    def run(self, held, lost):
        if self.failing:
            raise TaskFailedError("no memory")
        ranges = held.payload["ranges"]
        summaries = [{"tried": len(configs), "wrong": [], "default_us": 2.0, "best_us": 1.0} for *_, configs in ranges]
        about = {"target": fingerprint(CPU), "family": held.payload["family"]}
        return Outcome(summaries, [record(Workload.from_text(t), config=c[-1], us=1, **about) for t, _, c in ranges])


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
    found, done = evolve.evolved(task, database, executor, lambda: False)
    assert executor.deaths > 2, "together, then alone"
    assert executor.right
    assert len(select_where(database)) == len(executor.right)
    assert {config[TRACE] for config in found.ranges[0].configs[1:]} <= executor.right
    assert searched(task, database) == [False], "its traces have not competed yet"
    done()
    assert searched(task, database) == [True]
    record, _ = select_where(database)[0]
    assert (record.times.median, record.gb_per_s, record.roofline_share) == (2.0, 0.5, 0.5)


@pytest.mark.parametrize("broken", [1, evolve.ROUND + 1])
def test_a_machine_that_breaks_down_is_no_candidates_fault(task, database, unbuilt, broken):
    """In the first round or later: nothing of that round counts as failed, and all is tried again."""
    one = replace(task, ranges=task.ranges[:1])
    executor = FakeExecutor(broken=broken)
    with pytest.raises(TaskFailedError, match=r"the default neither: .* exit code -11"):
        evolve.evolved(one, database, executor, lambda: False)
    design = evolve._design(one, one.ranges[0])
    known = search_of(database, one.ranges[0].workload, fingerprint(CPU), design.space)
    assert (known.failed, known.asked) == (frozenset(), 0)
    kept = len(select_where(database))
    assert kept < broken
    again = FakeExecutor(deadly=1)
    evolve.evolved(one, database, again, lambda: False)
    assert len(again.met) == 12 - kept
    assert len(search_of(database, one.ranges[0].workload, fingerprint(CPU), design.space).failed) == 1


def test_a_search_that_was_stopped_goes_on(task, database, unbuilt):
    """With what was measured, right or wrong: nothing of it is lost, nor tried again."""
    first = FakeExecutor(deadly=1, wrong=2)
    stopped, done = evolve.evolved(task, database, first, lambda: bool(first.met))
    done()
    assert 3 < len(first.met) <= evolve.ROUND
    assert len(stopped.ranges[1].configs) == 1, "there was no time left for it"
    assert searched(task, database) == [False, False]
    one = replace(task, ranges=task.ranges[:1])
    again = FakeExecutor(wrong=10**3)
    found, done = evolve.evolved(one, database, again, lambda: False)
    done()
    assert again.met.keys().isdisjoint(first.met)
    assert len(again.met) + len(first.met) == 12
    assert {config[TRACE] for config in found.ranges[0].configs[1:]} <= first.right
    assert searched(task, database) == [True, False]
    third = FakeExecutor()
    assert evolve.evolved(one, database, third, lambda: False)[0] == found
    more = replace(one, ranges=(replace(one.ranges[0], traces=15),))
    assert third.met == {}
    assert searched(more, database) == [False]
    evolve.evolved(more, database, third, lambda: False)
    assert len(third.met) == 3
    assert third.met.keys().isdisjoint({*first.met, *again.met})


def test_a_search_for_more_than_there_is_ends(task, database, unbuilt, monkeypatch):
    """By itself; it counts, although there are fewer traces than were asked for."""
    design = evolve._design(task, task.ranges[0])
    small = replace(design, spaces=lambda schedule: design.spaces(schedule)[:1])
    monkeypatch.setattr(evolve, "_design", lambda task, wanted: small)
    for name, value in {"POPULATION": 16, "UNMEASURED": 4, "GENERATIONS": 1}.items():
        monkeypatch.setattr(evolve, name, value)
    all_of_it = replace(task, ranges=(replace(task.ranges[0], traces=10**4),))
    executor = FakeExecutor()
    _, done = evolve.evolved(all_of_it, database, executor, lambda: False)
    done()
    assert 4 < len(executor.met) < 10**4
    assert searched(all_of_it, database) == [True]


def test_a_space_that_has_changed_is_searched_anew(task, database, unbuilt, monkeypatch):
    """Its traces make other kernels: what was measured under the old ones is not read."""
    one = replace(task, ranges=task.ranges[:1])
    first = FakeExecutor()
    _, done = evolve.evolved(one, database, first, lambda: False)
    done()
    assert searched(one, database) == [True]
    monkeypatch.setattr(Design, "space", property(lambda design: "1" * 64))
    assert searched(one, database) == [False]
    again = FakeExecutor()
    found, _ = evolve.evolved(one, database, again, lambda: False)
    assert len(again.met) == 12
    assert {c[TRACE] for c in found.ranges[0].configs[1:]} <= again.met.keys()
    assert {c[SPACE] for c in found.ranges[0].configs[1:]} == {"1" * 64}


def test_a_trace_of_another_version_is_passed_over(task, database, unbuilt):
    """However fast it was: it has steps that no space of ours has."""
    task = replace(task, ranges=task.ranges[:1])
    design = evolve._design(task, task.ranges[0])
    schedule = tvm.s_tir.Schedule(design.module)
    schedule.annotate(schedule.get_sblock("product"), "pragma_import_llvm", "define void @f() { ret void }")
    verdict, about = Verdict(0.0, 1.0, "nothing"), Provenance("somebody", 1, "elsewhere", "0")
    assessment = Assessment(verdict, 1.0, 1.0, about)
    records = MetaScheduleDatabase(database, fingerprint(CPU), lambda record: assessment, space=design.space)
    target = tvm.target.Target(CPU.tvm_config())
    workload = records.commit_workload(design.module)
    for seconds in (1e-9, 2e-9, 3e-9, 4e-9):  # more than there are finalists
        records.commit_tuning_record(TuningRecord(schedule.trace, workload, [seconds], target, []))
    executor = FakeExecutor()
    found, _ = evolve.evolved(task, database, executor, lambda: False)
    foreign = text_of(schedule.trace)
    assert foreign not in executor.met
    assert len(found.ranges[0].configs) == 1 + evolve.FINALISTS
    assert {config[TRACE] for config in found.ranges[0].configs[1:]} <= executor.right
    assert executor.right


def test_a_measured_range_waits_for_its_search(task, database, unbuilt):
    """Of its configurations only the default and the best are measured again, beside the traces."""
    listed = {"a": 1}
    ranges = [replace(r, configs=(*r.configs, listed, {"a": 2})) for r in task.ranges]
    task = replace(task, ranges=tuple(ranges))

    def left():
        def asked(task, wanted):
            return evolve.is_searched(task, wanted, database, fingerprint(CPU))

        (progress,) = pending(database, [task], fingerprint(CPU), searched=asked)
        return progress

    def measured(config, us):
        about = {"target": fingerprint(CPU), "family": task.family, "config": config, "us": us}
        commit(database, [record(r.workload, **about) for r in task.ranges])

    measured(listed, us=9)
    assert left().state == "waiting"
    assert [r.configs for r in left().task.ranges] == [(r.configs[0], listed) for r in task.ranges]
    best = left().task

    def widen(task, over):
        return evolve.evolved(task, database, FakeExecutor(), over)

    for failing, state in ((True, "failed"), (False, "done")):
        progress = left()
        assert (progress.state, progress.task) == ("waiting", best), "the traces have not competed yet"
        tune(database, [progress], FakeMeasure(failing), Event(), widen=widen)
        assert progress.state == state
    assert left().state == "known"


def test_a_record_that_compile_would_not_use_is_measured_again(task, database):
    """A trace of a space that has changed since."""
    (wanted, *_) = task.ranges
    design = evolve._design(task, wanted)
    config = design.config(design.spaces(tvm.s_tir.Schedule(design.module))[0].trace)
    one = replace(task, ranges=(replace(wanted, traces=0),))

    def state():
        (progress,) = pending(database, [one], fingerprint(CPU), problem=problem_of)
        return progress.state

    commit(database, [record(wanted.workload, fingerprint(CPU), 1, {**config, SPACE: "0" * 64}, family=task.family)])
    assert "has changed since" in problem_of(task, wanted, {**config, SPACE: "0" * 64})
    assert state() == "waiting"
    commit(database, [record(wanted.workload, fingerprint(CPU), 2, config, family=task.family)])
    assert problem_of(task, wanted, config) == ""
    assert state() == "known"
