"""The search: crashes are results, what was measured is never lost nor measured again."""

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from threading import Event

import pytest
from rich.console import Console

from tests.schedules.database.samples import record
from vllm_compile.canonical import canonical
from vllm_compile.cli import main
from vllm_compile.cli_tune_table import table
from vllm_compile.driver import lower_model
from vllm_compile.schedules.database import Workload, open_database
from vllm_compile.schedules.database.executors import Outcome, TaskCrashedError, TaskFailedError
from vllm_compile.schedules.database.machine import fingerprint
from vllm_compile.schedules.database.store import select_where
from vllm_compile.schedules.database.tasks import all_tasks, lease, waiting_for
from vllm_compile.schedules.tuning.extract import tasks_of
from vllm_compile.schedules.tuning.search import Progress, expected_seconds, pending, submit, time_left, tune
from vllm_compile.schedules.tuning.task import MEASURE
from vllm_compile.targets import resolve

MACHINE = fingerprint(resolve("cpu"))


@pytest.fixture(scope="module")
def tasks(tiny):
    return tasks_of(lower_model(tiny, resolve("cpu")), resolve("cpu"), trials=4)


class FakeExecutor:
    """Answers as `measure` would, unless a deadly configuration is in the task; `suspect` is what it says it was at."""

    def __init__(self, deadly=(), after=lambda: None, error=TaskCrashedError, suspect=None):
        self.deadly, self.after, self.asked, self.error, self.suspect = list(deadly), after, 0, error, suspect

    def run(self, held, lost):
        self.asked += 1
        assert not lost.is_set(), "what is under way is not given up"
        ranges = held.payload["ranges"]
        if any(config in self.deadly for _, _, configs in ranges for config in configs):
            if self.suspect is not None:
                Path(held.payload["note"]).write_text(canonical(self.suspect))
            raise self.error("its process ended with exit code -11")
        self.after()
        summaries = [{"tried": len(c), "wrong": [], "default_us": 2.0, "best_us": 1.0} for _, _, c in ranges]
        about = {"target": MACHINE, "family": held.payload["family"]}
        return Outcome(summaries, [record(Workload.from_text(text), **about) for text, _, _ in ranges])

    def close(self):
        pass


def test_all_is_measured_once(tasks, database):
    executor = FakeExecutor()
    work = pending(database, tasks, MACHINE)
    tune(database, work, executor, Event())
    assert [progress.state for progress in work] == ["done"] * len(tasks)
    assert all(progress.gain() == pytest.approx(2) for progress in work)
    again = pending(database, tasks, MACHINE)
    assert {progress.state for progress in again} == {"known"}
    tune(database, again, executor, Event())
    assert executor.asked == len(tasks)


def test_candidates_that_crash_are_left_out(tasks, database):
    deadly = tasks[0].configs()[1:3]
    work = pending(database, tasks[:1], MACHINE)
    tune(database, work, FakeExecutor(deadly), Event())
    assert (work[0].state, work[0].failed) == ("done", 2)
    left = tasks[0].only([config for config in tasks[0].configs() if config not in deadly])
    assert work[0].tried == sum(len(r.configs) for r in left.ranges)


def test_who_was_called_last_is_suspected_first(tasks, database):
    """And tried alone: it is not taken at its word."""
    configs = tasks[0].configs()
    assert len(configs) > 2
    asked = {}
    for suspect in (configs[-1], configs[0], {"of another task": 1}, None):
        executor = FakeExecutor(configs[-1:], suspect=suspect)
        work = pending(database, tasks[:1], replace(MACHINE, device=str(suspect)))
        tune(database, work, executor, Event())
        assert (work[0].state, work[0].failed) == ("done", 1)
        assert work[0].tried == sum(len(r.configs) for r in tasks[0].only(configs[:-1]).ranges)
        asked[str(suspect)] = executor.asked
    right, wrong, unknown, nobody = asked.values()
    assert right == 4, "all, the defaults, the suspect, the others"
    assert unknown == nobody == wrong - 1 > right


def test_a_default_that_crashes_fails_its_task_alone(tasks, database):
    work = pending(database, tasks, MACHINE)
    tune(database, work, FakeExecutor([tasks[0].ranges[0].configs[0]]), Event())
    assert work[0].state == "failed"
    assert {progress.state for progress in work} <= {"failed", "done"}


def test_candidates_that_crash_together_only(tasks, database):
    """Neither half of them does alone: one half is left out."""
    executor = FakeExecutor()
    whole = len(tasks[0].configs())
    run = executor.run

    def run_unless_whole(held, lost):
        given = {str(config) for _, _, configs in held.payload["ranges"] for config in configs[1:]}
        if len(given & {str(config) for config in tasks[0].configs()}) == whole:
            raise TaskCrashedError("out of memory")
        return run(held, lost)

    executor.run = run_unless_whole
    work = pending(database, tasks[:1], MACHINE)
    tune(database, work, executor, Event())
    assert (work[0].state, work[0].failed) == ("done", whole - whole // 2)


def test_an_error_is_nobodys_fault(tasks, database):
    """What is no crash is not looked for among the candidates, and is told."""
    executor = FakeExecutor(tasks[0].configs()[:1], error=TaskFailedError)
    work = pending(database, tasks[:1], MACHINE)
    tune(database, work, executor, Event())
    assert (work[0].state, work[0].failed, executor.asked) == ("failed", 0, 1)
    assert "exit code -11" in work[0].reason


def test_stopping_loses_nothing(tasks, database):
    stop = Event()
    work = pending(database, tasks, MACHINE)
    tune(database, work, FakeExecutor(after=stop.set), stop)
    assert [progress.state for progress in work] == ["done"] + ["waiting"] * (len(tasks) - 1)
    assert [p.state for p in pending(database, tasks, MACHINE)] == ["known"] + ["waiting"] * (len(tasks) - 1)


def test_a_budget_ends_the_search(tasks, database):
    executor = FakeExecutor()
    tune(database, pending(database, tasks, MACHINE), executor, Event(), budget=-1)
    assert executor.asked == 0


def test_workers_get_the_tasks(tasks, database):
    assert submit(database, pending(database, tasks, MACHINE), MACHINE) == len(tasks)
    assert submit(database, pending(database, tasks, MACHINE), MACHINE) == 0, "they are in the queue"
    wanted = [json.loads(json.dumps(task.payload() | {"machine": MACHINE.text})) for task in tasks]
    assert [task.payload for task in all_tasks(database)] == wanted
    assert waiting_for(database) == {MACHINE.summary(): len(tasks)}
    assert submit(database, pending(database, tasks, MACHINE), replace(MACHINE, tvm="newer")) == len(tasks)


def test_more_work_is_expected_to_take_longer(tasks):
    assert expected_seconds(tasks, 10.0) > expected_seconds(tasks[:1], 10.0) > expected_seconds(tasks[:1], 100.0) > 0


def test_time_left_follows_the_pace(tasks):
    """What took twice as long as was thought makes the rest twice as long; at the end there is none."""
    work = [Progress(task) for task in tasks]
    assert time_left(work, 10.0, 0.0) == expected_seconds(tasks, 10.0)
    work[0].state = "done"
    spent, rest = expected_seconds(tasks[:1], 10.0), expected_seconds(tasks[1:], 10.0)
    assert time_left(work, 10.0, spent) == pytest.approx(rest)
    assert time_left(work, 10.0, 2 * spent) == pytest.approx(2 * rest)
    for progress in work:
        progress.state = "done"
    assert time_left(work, 10.0, spent) == 0


def test_the_table_says_how_far_it_is(tasks):
    """Roofline and time of what is done, nothing of what is not."""
    work = [Progress(task) for task in tasks[:2]]
    work[0].state, work[0].best_us, work[0].roofline_share = "done", 12.34, 0.567
    work[0].speedups = [1.5]
    narrow, output = StringIO(), StringIO()
    Console(file=narrow, width=80).print(table(work, 90.0))
    assert "1.50x" in narrow.getvalue()
    Console(file=output, width=200).print(table(work, 90.0))
    done, waiting = (line for line in output.getvalue().splitlines() if "_weight" in line)
    assert "12.3" in done
    assert "57%" in done
    assert "%" not in waiting
    assert "about 1.5 minutes left" in output.getvalue()


def test_workers_of_boards_get_the_tasks(tiny, tmp_path, capsys):
    url, command = str(tmp_path / "tuning.db"), ["tune", "--model", str(tiny), "--only", "down_proj", "--json"]
    for where in ([], ["--board", "slate"]):
        assert main([*command, "--db", url, "--submit", *where]) == 0
        (told,) = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
        assert told["state"] == "queued"
    assert main(["db", "--db", url, "stats", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["queued_for"]
    board = fingerprint(resolve("cpu"), "slate")
    assert said == {MACHINE.summary(): 1, board.summary(): 1}
    with open_database(url) as database:
        assert lease(database, "a", [MEASURE], 60, [board]).payload["machine"] == board.text
        assert lease(database, "a", [MEASURE], 60, [board]) is None


@pytest.mark.slow
def test_from_the_command_line_to_the_manifest(tiny, tmp_path, capsys):
    """Tuned on this machine, found by `compile --db`; the second time there is nothing left to do."""
    url, artifact = str(tmp_path / "tuning.db"), tmp_path / "artifact"
    command = ["tune", "--model", str(tiny), "--db", url, "--trials", "2", "--only", "down_proj", "--json"]
    assert main(command) == 0
    (task,) = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    assert (task["state"], task["failed"], task["wrong"]) == ("done", 0, 0)
    assert main(command) == 0
    (task,) = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    assert task["state"] == "known"
    assert main(["compile", "--model", str(tiny), "--db", url, "--out", str(artifact), "--no-cache"]) == 0
    kernels = json.loads((artifact / "manifest.json").read_text())["kernels"]
    tuned = [kernel for kernel in kernels if kernel["record"] is not None]
    assert tuned
    assert {kernel["op"] for kernel in tuned} == {"linear"}
    with open_database(url, writable=False) as database:
        ids = {found.id for found, _ in select_where(database)}
    assert {kernel["record"]["id"] for kernel in tuned} <= ids


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--db", "x.db", "--target", "gaudi2"], "Gaudi.s kernels have no"),
        ([], "--db URL is needed"),
        (["--db", "x.db", "--traces", "8", "--dtype", "bfloat16"], "gates of MLPs have, with --pack none"),
        (["--dry-run", "--only", "nothing_like_it"], "there are .*lm_head_weight"),
    ],
)
def test_what_cannot_be_tuned_is_said(tiny, more, message, capfd):
    assert main(["tune", "--model", str(tiny), *more]) == 2
    assert re.search(message, capfd.readouterr().err.replace("\n", " "))


def test_a_dry_run_of_an_artifact_needs_no_database(tiny_bf16, capsys):
    assert main(["tune", "--model", str(tiny_bf16), "--dry-run", "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]
    assert {task["state"] for task in tasks} == {"waiting"}
