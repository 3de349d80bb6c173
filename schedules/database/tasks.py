"""The fleet's queue: each task is done once, whichever worker dies, stalls, or has a wrong clock.

A task may be for a machine, as far as it says which; only workers that such a machine is at hand for are given it.

A worker holds a task by a *lease*, which runs out unless it is renewed (heartbeat), by the database's clock.  Each
lease of a task has a higher *fence*; a result is taken only with the fence of the lease in force, in one transaction
with the records that come with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, and_, func, or_, select, update

from vllm_compile.canonical import canonical, sha256
from vllm_compile.errors import LeaseLostError

from .clock import now
from .fingerprint import Fingerprint
from .home import Database
from .intern import insert_new, intern_machine
from .record import Record, State
from .rows import machine_of
from .schema import targets, tasks
from .store import insert


class TaskState(StrEnum):
    QUEUED = "queued"
    LEASED = "leased"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Lease:
    """A task in a worker's hands.

    Attributes:
        kind, payload: what to do; the payload is JSON.
        fence: higher than those of all leases of the task before.
        attempt: 1 for the first.
    """

    task: int
    kind: str
    payload: Any
    fence: int
    attempt: int


@dataclass(frozen=True)
class Task:
    """A task as the table has it; times are Unix seconds by the database's clock."""

    id: int
    kind: str
    payload: Any
    priority: float
    state: TaskState
    attempts: int
    worker: str | None
    result: Any
    error: str | None


def submit(
    database: Database,
    kind: str,
    payloads: Sequence[Any],
    priority: float = 0.0,
    max_attempts: int = 3,
    machine: Fingerprint | None = None,
) -> int:
    """Queue tasks; gives how many were new: one of the same kind, machine and payload is there once, done or not.

    What is not known of `machine` does not matter, but for its kind and architecture; None: any will do.
    """
    where = [] if machine is None else [machine.text]
    rows = [
        {
            "kind": kind,
            "payload": (text := canonical(payload)),
            "digest": sha256(canonical([kind, text, *where])),
            "priority": priority,
            "state": TaskState.QUEUED,
            "attempts": 0,
            "max_attempts": max_attempts,
            "fence": 0,
        }
        for payload in payloads
    ]
    with database.writing() as connection:
        before = _count(connection)
        if rows:
            number = None if machine is None else intern_machine(connection, machine)
            connection.execute(insert_new(connection, tasks).values(machine_id=number, created_at=now()), rows)
        return _count(connection) - before


def lease(
    database: Database, worker: str, kinds: Sequence[str], seconds: float, machines: Sequence[Fingerprint] = ()
) -> Lease | None:
    """Take the next task of these kinds for `seconds`, highest priority first; None if there is none to take.

    Tasks for a machine are taken only if it is one of `machines`, as far as the task says.
    A task whose lease ran out is queued again by this, or fails if that was its last attempt.
    """
    run_out = and_(tasks.c.state == TaskState.LEASED, tasks.c.lease_expires <= now())
    waiting = or_(tasks.c.state == TaskState.QUEUED, and_(run_out, tasks.c.attempts < tasks.c.max_attempts))
    with database.writing() as connection:
        lost = select(tasks.c.id).where(run_out, tasks.c.attempts >= tasks.c.max_attempts)
        connection.execute(
            update(tasks)
            .where(tasks.c.id.in_(lost.with_for_update(skip_locked=True)))
            .values(state=TaskState.FAILED, finished_at=now(), error="its worker's lease ran out, at the last attempt")
        )
        here = or_(tasks.c.machine_id.is_(None), tasks.c.machine_id.in_(_described(connection, machines)))
        next_task = (
            select(tasks.c.id)
            .where(waiting, tasks.c.kind.in_(kinds), here)
            .order_by(tasks.c.priority.desc(), tasks.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        row = connection.execute(
            update(tasks)
            .where(tasks.c.id == next_task.scalar_subquery())
            .values(
                state=TaskState.LEASED,
                worker=worker,
                fence=tasks.c.fence + 1,
                attempts=tasks.c.attempts + 1,
                lease_expires=now() + seconds,
            )
            .returning(tasks.c.id, tasks.c.kind, tasks.c.payload, tasks.c.fence, tasks.c.attempts)
        ).first()
    return None if row is None else Lease(row.id, row.kind, json.loads(row.payload), row.fence, row.attempts)


def renew(database: Database, held: Lease, seconds: float) -> None:
    """Hold the task for `seconds` from now; LeaseLostError if the lease has run out."""
    with database.writing() as connection:
        _update(connection, held, lease_expires=now() + seconds)


def complete(database: Database, held: Lease, result: Any, records: Sequence[Record] = ()) -> None:
    """Store a task's result and records, all or none.  Once more is no error: the first answer may have been lost.

    Raises:
        LeaseLostError: the lease has run out; nothing is stored.
        DatabaseError: a record is not fit to be committed; nothing is stored.
    """
    with database.writing() as connection:
        done = and_(tasks.c.id == held.task, tasks.c.fence == held.fence, tasks.c.state == TaskState.DONE)
        if connection.scalar(select(tasks.c.id).where(done)) is not None:
            return
        _update(connection, held, state=TaskState.DONE, result=canonical(result), error=None, finished_at=now())
        insert(connection, ((record, State.CANDIDATE) for record in records))


def give_up(database: Database, held: Lease, error: str) -> None:
    """Record why an attempt failed: the task is queued again, or fails if that was its last attempt.

    Raises:
        LeaseLostError: the lease has run out.
    """
    with database.writing() as connection:
        left = select(tasks.c.max_attempts - tasks.c.attempts).where(tasks.c.id == held.task)
        if (connection.scalar(left) or 0) > 0:
            _update(connection, held, state=TaskState.QUEUED, error=error)
        else:
            _update(connection, held, state=TaskState.FAILED, error=error, finished_at=now())


def all_tasks(database: Database) -> list[Task]:
    """Every task, by id."""
    columns = [tasks.c[name] for name in ("id", "kind", "payload", "priority", "state", "attempts", "worker")]
    with database.reading() as connection:
        rows = connection.execute(select(*columns, tasks.c.result, tasks.c.error).order_by(tasks.c.id)).all()
    return [
        Task(
            row.id,
            row.kind,
            json.loads(row.payload),
            row.priority,
            TaskState(row.state),
            row.attempts,
            row.worker,
            None if row.result is None else json.loads(row.result),
            row.error,
        )
        for row in rows
    ]


def counts(database: Database) -> dict[str, int]:
    """How many tasks are in each state."""
    with database.reading() as connection:
        rows = connection.execute(select(tasks.c.state, func.count()).group_by(tasks.c.state)).all()
    found = {row[0]: int(row[1]) for row in rows}
    return {state.value: found.get(state, 0) for state in TaskState}


def waiting_for(database: Database) -> dict[str, int]:
    """How many tasks are queued for each machine, as people call it; `any` of those for none in particular."""
    counted = (
        select(targets.c.id, targets.c.text, func.count().label("number"))
        .select_from(tasks.outerjoin(targets, tasks.c.machine_id == targets.c.id))
        .where(tasks.c.state == TaskState.QUEUED)
        .group_by(targets.c.id, targets.c.text)
    )
    found: dict[str, int] = {}
    with database.reading() as connection:
        for row in connection.execute(counted):
            name = "any" if row.id is None else machine_of(row, database.name).summary()
            found[name] = found.get(name, 0) + int(row.number)
    return found


def _described(connection: Connection, machines: Sequence[Fingerprint]) -> Sequence[int]:
    """Ids of what tasks may be for that is one of these machines; nothing damaged is, whose tasks wait."""
    alike = or_(*(and_(targets.c.kind == m.kind, targets.c.arch == m.arch) for m in machines))
    rows = connection.execute(select(targets.c.id, targets.c.text).where(alike)) if machines else ()
    found = []
    for row in rows:
        with suppress(ValueError):
            wanted = Fingerprint.from_text(row.text)
            if any(wanted.describes(machine) for machine in machines):
                found.append(row.id)
    return found


def _update(connection: Connection, held: Lease, **values: Any) -> None:
    """Change a task that this lease is in force for."""
    in_force = and_(
        tasks.c.id == held.task,
        tasks.c.fence == held.fence,
        tasks.c.state == TaskState.LEASED,
        tasks.c.lease_expires > now(),
    )
    if connection.execute(update(tasks).where(in_force).values(**values)).rowcount != 1:
        raise LeaseLostError(
            f"task {held.task}: the lease of attempt {held.attempt} has run out; its result is not taken"
        )


def _count(connection: Connection) -> int:
    return int(connection.scalar(select(func.count()).select_from(tasks)) or 0)
