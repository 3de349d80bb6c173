"""Tasks in a process of their own: crashes, hangs and errors are failed attempts; the worker goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread, Timer

import psutil
import pytest

from vllm_compile.schedules.database.executors import LocalExecutor, Outcome, TaskCrashedError, TaskFailedError
from vllm_compile.schedules.database.tasks import Lease, all_tasks, counts, submit
from vllm_compile.schedules.database.worker import Worker, work

from .samples import record


def square(number) -> Outcome:
    return Outcome(number**2, [record(config={"task": number})])


def fail(number) -> Outcome:
    raise ValueError(f"{number} is no good")


def crash(number) -> Outcome:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Outcome()


def hang(number) -> Outcome:
    time.sleep(1000)
    return Outcome()


def start_and_hang(path) -> Outcome:
    child = subprocess.Popen(["sleep", "1000"])
    Path(path).write_text(str(child.pid))
    return hang(0)


def unchecked(number) -> Outcome:
    return Outcome(None, [record(us=-1)])


HANDLERS = {
    "square": square,
    "fail": fail,
    "crash": crash,
    "hang": hang,
    "start_and_hang": start_and_hang,
    "unchecked": unchecked,
}


@pytest.fixture(scope="module")
def executor():
    """Its time-out is for tasks that are expected to end; a process's start is part of it."""
    made = LocalExecutor(HANDLERS, timeout=300)
    yield made
    made.close()


def task(kind: str, payload=3) -> Lease:
    return Lease(1, kind, payload, 1, 1)


@pytest.mark.parametrize(
    ("kind", "words", "crashed"),
    [("fail", "ValueError: 3 is no good", False), ("crash", "exit code -11", True)],
)
def test_failed_attempts(executor, kind, words, crashed):
    with pytest.raises(TaskFailedError, match=words) as raised:
        executor.run(task(kind), Event())
    assert isinstance(raised.value, TaskCrashedError) == crashed


def test_hang():
    hasty = LocalExecutor(HANDLERS, timeout=2)
    with pytest.raises(TaskCrashedError, match="longer than 2 s"):
        hasty.run(task("hang"), Event())


def test_what_a_task_started_ends_with_it(executor, tmp_path):
    lost, pid = Event(), tmp_path / "pid"

    def lose():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        lost.set()

    Thread(target=lose, daemon=True).start()
    with pytest.raises(TaskFailedError, match="lease was lost"):
        executor.run(task("start_and_hang", str(pid)), lost)
    deadline = time.monotonic() + 60
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(int(pid.read_text())).status() != psutil.STATUS_ZOMBIE:  # nobody may wait for it here
            assert time.monotonic() < deadline, "it lives on"
            time.sleep(0.05)
    assert executor.run(task("square"), Event()) == square(3)  # and goes on


def test_stops_when_the_lease_is_lost(executor):
    executor.run(task("square"), Event())
    lost, start = Event(), time.monotonic()
    Timer(0.2, lost.set).start()
    with pytest.raises(TaskFailedError, match="lease was lost"):
        executor.run(task("hang"), lost)
    assert time.monotonic() - start < 60


def test_a_worker_does_what_it_can(executor, database):
    for kind in ("square", "fail", "unchecked"):
        submit(database, kind, [1, 2], max_attempts=2)
    submit(database, "unknown", [1])
    done = Worker(database, executor, list(HANDLERS), "a").run(Event(), until_empty=True)
    assert (done.completed, done.failed, done.lost) == (2, 8, 0)
    assert counts(database) == {"queued": 1, "leased": 0, "done": 2, "failed": 4}
    errors = {t.kind: t.error for t in all_tasks(database) if t.error}
    assert errors["fail"] == "ValueError: 2 is no good"
    assert "must be positive numbers" in errors["unchecked"]


class Broken(LocalExecutor):
    def run(self, held, lost):
        raise RuntimeError("broken")


def test_workers_side_by_side_stop_when_one_cannot_go_on(executor, database):
    submit(database, "square", [1])
    workers = [Worker(database, Broken({}, 1), ["square"], "a"), Worker(database, executor, ["other"], "b")]
    with pytest.raises(RuntimeError, match="broken"):
        work(workers, Event())
