"""Many workers, killed at random, a server restarted, a clock that jumps: each task is done once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
from sqlalchemy import select, update

from tests.conftest import SEED
from vllm_compile.errors import DatabaseError, LeaseLostError
from vllm_compile.schedules.database import open_database, tasks
from vllm_compile.schedules.database.bundle import all_records
from vllm_compile.schedules.database.schema import targets
from vllm_compile.schedules.database.schema import tasks as table
from vllm_compile.schedules.database.tasks import (
    TaskState,
    all_tasks,
    complete,
    counts,
    give_up,
    lease,
    renew,
    submit,
    waiting_for,
)

from .fleet import KIND
from .samples import CPU, H200, record

ROOT = Path(__file__).parents[3]
TASKS = 2000
LIMIT = 1200  # seconds; a minute on a machine that does nothing else
ATTEMPTS = 30  # more than a task can be killed
ANY_H200 = replace(H200, driver="", core_mhz=0)
BOARD = replace(CPU, device="slate", cores=0)
FOR = (CPU, ANY_H200, None)


class Fleet:
    """Workers in processes of their own, one of which has a clock that jumps; the dead are replaced."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._random, self.started, self.killed = url, random.Random(SEED), 0, 0
        self.processes = [self._start(index) for index in range(size)]

    def _start(self, index: int) -> subprocess.Popen:
        """Every other one has a GPU instead of a CPU."""
        self.started += 1
        machine = ("cpu", "cuda")[index % 2]
        name, seed = f"{machine}{self.started}", f"{SEED}-{self.started}"
        jump = ["jump"] if self.started % 4 == 1 else []
        command = [sys.executable, "-m", "tests.schedules.database.fleet", self._url, name, seed, machine, *jump]
        return subprocess.Popen(command, cwd=ROOT)

    def kill_one(self) -> None:
        index = self._random.randrange(len(self.processes))
        self.processes[index].kill()
        self.processes[index].wait()
        self.killed += 1
        self.processes[index] = self._start(index)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def run(url: str, size: int, kills: int, half_way=lambda: None) -> None:
    """TASKS tasks by a fleet, killed `kills` times while it works; then what is left is looked at.

    Tasks come in portions, each before the fleet is through with the one before, so that it cannot be done before it
    has been killed as often as it shall be.  A third of them are for a CPU, a third for a GPU whose driver does not
    matter, the rest for any machine.
    """
    bounds = [TASKS * i // (kills + 1) for i in range(kills + 2)]
    with open_database(url) as database:
        fleet, deadline = Fleet(url, size), time.monotonic() + LIMIT

        def submit_portion(first: int, last: int) -> None:
            for n, machine in enumerate(FOR):
                numbers = [task for task in range(first, last) if task % len(FOR) == n]
                assert submit(database, KIND, numbers, max_attempts=ATTEMPTS, machine=machine) == len(numbers)

        def wait_for(tasks: int) -> None:
            while counts(database)["done"] < tasks:
                assert time.monotonic() < deadline, counts(database)
                time.sleep(0.1)

        try:
            for first, last in pairwise(bounds):
                submit_portion(first, last)
                wait_for((first + last) // 2)
                if first <= TASKS // 2 < last:
                    half_way()
                if last < TASKS:
                    fleet.kill_one()
            wait_for(TASKS)
        finally:
            fleet.stop()
        found = sorted(all_tasks(database), key=lambda task: task.payload)
        assert [(task.payload, task.result, task.state) for task in found] == [
            (n, n * n, TaskState.DONE) for n in range(TASKS)
        ]
        assert measured(database) == Counter(range(TASKS))
        for task in found:
            wanted = FOR[task.payload % len(FOR)]
            assert wanted is None or task.worker.rstrip("0123456789") == wanted.kind, task
        again = sum(task.attempts > 1 for task in found)
        print(f"{fleet.killed} kills, {again} tasks took more than one attempt, seed {SEED}")
        assert fleet.killed == kills


def measured(database) -> Counter:
    """How many records each task has left."""
    return Counter(json.loads(item[0].schedule.text)["config"]["task"] for item in all_records(database))


@pytest.mark.slow
def test_postgresql(server):
    def restart() -> None:
        server.stop("immediate")  # as in a crash
        server.start()

    run(server.create("fleet"), size=8, kills=12, half_way=restart)


@pytest.mark.slow
def test_sqlite(tmp_path):
    run(str(tmp_path / "fleet.db"), size=4, kills=6)


def pass_time(database, seconds: float) -> None:
    """As if it were so many seconds later: when leases run out is moved, as the database's clock cannot be."""
    with database.engine.begin() as connection:
        connection.execute(update(table).values(lease_expires=table.c.lease_expires - seconds))


@pytest.fixture
def held(database):
    """A lease that has run out, and the one that another worker has got since."""
    submit(database, KIND, [1])
    first = lease(database, "first", [KIND], 600)
    assert lease(database, "second", [KIND], 600) is None
    pass_time(database, 600)
    return first, lease(database, "second", [KIND], 600)


def outcome(name: str):
    return 1, [record(config={"task": 1}, host=name)]


def test_whose_lease_ran_out_commits_nothing(database, held):
    first, second = held
    assert second.fence > first.fence
    for call in (
        lambda: complete(database, first, *outcome("first")),
        lambda: renew(database, first, 60),
        lambda: give_up(database, first, "late"),
    ):
        with pytest.raises(LeaseLostError, match="has run out"):
            call()
    assert measured(database) == Counter()
    complete(database, second, *outcome("second"))
    complete(database, second, *outcome("second"))  # the answer was lost: once more is no error
    with pytest.raises(LeaseLostError):
        complete(database, first, *outcome("first"))
    assert measured(database) == Counter([1])


def test_without_fences_it_would_be_done_twice(database, held, monkeypatch):
    """The test above can fail: with the fence not looked at, both workers' records are there."""
    monkeypatch.setattr(tasks, "_update", lambda connection, held, **values: None)
    for name, each in zip(("first", "second"), held, strict=True):
        complete(database, each, *outcome(name))
    assert measured(database) == Counter([1, 1])


def test_a_lease_that_nobody_else_took_has_run_out_too(database):
    submit(database, KIND, [1])
    held = lease(database, "first", [KIND], 600)
    pass_time(database, 600)
    with pytest.raises(LeaseLostError):
        complete(database, held, 1)


def test_renewed(database):
    submit(database, KIND, [1])
    held = lease(database, "first", [KIND], 600)
    for _ in range(3):
        pass_time(database, 300)
        renew(database, held, 600)
    complete(database, held, 1)


def test_attempts_end(database):
    submit(database, KIND, [1], max_attempts=2)
    give_up(database, lease(database, "a", [KIND], 60), "no luck")
    assert [(t.state, t.error) for t in all_tasks(database)] == [(TaskState.QUEUED, "no luck")]
    give_up(database, lease(database, "a", [KIND], 60), "none again")
    assert [(t.state, t.error) for t in all_tasks(database)] == [(TaskState.FAILED, "none again")]
    assert lease(database, "a", [KIND], 60) is None


def test_deaths_are_attempts(database):
    submit(database, KIND, [1], max_attempts=2)
    for _ in range(2):
        assert lease(database, "a", [KIND], 600) is not None
        pass_time(database, 600)
    assert lease(database, "a", [KIND], 60) is None
    (task,) = all_tasks(database)
    assert (task.state, task.error) == (TaskState.FAILED, "its worker's lease ran out, at the last attempt")


def test_order_kinds_and_duplicates(database):
    assert submit(database, KIND, [1, 2]) == 2
    assert submit(database, KIND, [2, 3], priority=5) == 1
    assert submit(database, "other", [4], priority=9) == 1
    taken = [lease(database, "a", [KIND], 60).payload for _ in range(3)]
    assert taken == [3, 1, 2]
    assert lease(database, "a", [KIND], 60) is None


def test_a_wrong_record_is_not_done(database):
    submit(database, KIND, [1])
    held = lease(database, "a", [KIND], 60)
    with pytest.raises(DatabaseError, match="was not compared"):
        complete(database, held, 1, [record(verdict=None)])
    assert counts(database)["leased"] == 1


H100 = replace(H200, device="NVIDIA H100")


@pytest.mark.parametrize(
    ("machines", "taken"),
    [
        ([], {0}),
        ([CPU], {0, 1}),
        ([BOARD], {0, 2}),
        ([replace(BOARD, device="another board")], {0}),
        ([H200], {0, 3}),
        ([replace(H200, driver="older")], {0, 3}),
        ([H100], {0}),
        ([replace(CPU, tvm="newer"), replace(H200, arch="sm_100a")], {0}),
        ([CPU, H200], {0, 1, 3}),
    ],
)
def test_a_task_for_a_machine_is_taken_where_it_is(database, machines, taken):
    """No other worker sees it, hence no attempt is lost."""
    for n, machine in enumerate((None, CPU, BOARD, ANY_H200)):
        assert submit(database, KIND, [n], machine=machine) == 1
        assert submit(database, KIND, [n], machine=machine) == 0
    assert submit(database, KIND, [0], machine=replace(CPU, cores=64)) == 1, "for another machine it is another task"
    found = set()
    while (held := lease(database, "a", [KIND], 60, machines)) is not None:
        found.add(held.payload)
    assert found == taken
    assert {t.attempts for t in all_tasks(database) if t.state == TaskState.QUEUED} == {0}
    assert sum(waiting_for(database).values()) == 5 - len(taken)


def test_a_machines_task_whose_worker_died_waits_for_such_a_machine(database):
    submit(database, KIND, [1], machine=H200)
    assert lease(database, "a", [KIND], 0.05, [H200]) is not None
    time.sleep(0.1)
    assert lease(database, "b", [KIND], 60, [CPU]) is None
    assert lease(database, "c", [KIND], 60, [CPU, H200]).attempt == 2


def test_a_damaged_machine_keeps_nobody_from_others(database):
    """Its own tasks wait; `db stats` says which row it is."""
    for n, machine in enumerate((BOARD, CPU)):
        submit(database, KIND, [n], machine=machine)
    with database.engine.begin() as connection:
        number = connection.scalar(select(targets.c.id).where(targets.c.text == BOARD.text))
        connection.execute(update(targets).where(targets.c.id == number).values(text="{}"))
    assert lease(database, "a", [KIND], 60, [BOARD, CPU]).payload == 1
    assert lease(database, "a", [KIND], 60, [BOARD, CPU]) is None
    with pytest.raises(DatabaseError, match=f"machine {number} is not what was committed"):
        waiting_for(database)


def test_who_waits_for_what(database):
    submit(database, KIND, [1, 2])
    submit(database, KIND, [3], machine=BOARD)
    submit(database, KIND, [4, 5], machine=replace(BOARD, tvm="older"))
    board = "cpu x86-64-v4 slate, tvm"
    waiting = {"any": 2, f"{board} {BOARD.tvm}, intrinsics 1": 1, f"{board} older, intrinsics 1": 2}
    assert waiting_for(database) == waiting, "whoever has such a board sees what is different"
    lease(database, "a", [KIND], 60, [BOARD])
    assert waiting_for(database) == waiting | {"any": 1}


@pytest.mark.parametrize("field", [field.name for field in fields(H200)])
def test_what_is_said_of_a_machine_tells_it_from_others(field):
    other = replace(H200, **{field: type(getattr(H200, field))(7)})
    assert not H200.describes(other)
    assert H200.summary() != other.summary()
