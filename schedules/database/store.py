"""Writing records, and moving their states: candidate -> verified -> promoted -> retired.

A state belongs to a schedule (of a workload, on a machine), whoever measured it: all measured records of it have the
same, and where they are retired, so are its estimates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, and_, bindparam, case, distinct, func, select, update

from vllm_compile.errors import DatabaseError

from .home import Database
from .intern import insert_new, intern
from .record import STATES, How, Record, State, check
from .rows import record_of, row_of, select_records
from .schema import records, targets, workloads

HOSTS = 2  # on so many a schedule must have been measured to be verified
RETIRED = STATES.index(State.RETIRED)
CHUNK = 500  # rows of one statement; SQLite has a limit on variables
RANK = case({state.value: rank for rank, state in enumerate(STATES)}, value=records.c.state)
GROUP = (records.c.workload_id, records.c.target_id, records.c.how, records.c.schedule_digest)


def commit(database: Database, new: Sequence[Record]) -> list[str]:
    """Store records, all or none; gives their ids.  One that is there already changes nothing.

    Raises:
        DatabaseError: a record was not compared with its reference, or failed; or `Database.writing` refuses.
    """
    with database.writing() as connection:
        return insert(connection, ((record, State.CANDIDATE) for record in new))


def insert(connection: Connection, new: Iterable[tuple[Record, State]]) -> list[str]:
    """Store records within a transaction; of two states of one schedule the later one holds."""
    known: dict[tuple[Any, str], int] = {}

    def number(table: Any, text: str, digest: str, **columns: Any) -> int:
        if (table, text) not in known:
            known[table, text] = intern(connection, table, digest, text, **columns)
        return known[table, text]

    rows = []
    for record, state in new:
        check(record, state)
        workload = number(workloads, record.workload.text, record.workload.key)
        machine = record.target
        target = number(targets, machine.text, machine.key, kind=machine.kind, arch=machine.arch)
        rows.append(row_of(record, workload, target, state))
    groups = {(row["workload_id"], row["target_id"], row["how"], row["schedule_digest"]) for row in rows}
    _lock(connection, {group[0] for group in groups})
    states: dict[str, str] = {}
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        connection.execute(insert_new(connection, records), chunk)
        ids = [row["id"] for row in chunk]
        states |= {row.id: row.state for row in connection.execute(_states_of(ids))}
    later = [row for row in rows if STATES.index(State(states[row["id"]])) < STATES.index(row["state"])]
    _set(connection, [(row["id"], row["state"]) for row in later])
    _settle(connection, groups)
    return [row["id"] for row in rows]


def promote(database: Database, prefix: str) -> str:
    """Prefer the schedule of this record to faster ones; gives the record's id.

    Raises:
        DatabaseError: no such record, or it is not verified, as an estimate never is.
    """
    return _move(database, prefix, State.PROMOTED, from_=(State.VERIFIED,))


def retire(database: Database, prefix: str) -> str:
    """Never give the schedule of this record as an answer again; gives the record's id.

    A measured one takes the schedule's estimates with it, also those to come.  An estimate takes the other estimates
    that are there: neither a measurement nor a later estimate (of a model that has changed) is forbidden by it.

    Raises:
        DatabaseError: no such record, or it is retired already.
    """
    return _move(database, prefix, State.RETIRED, from_=(State.CANDIDATE, State.VERIFIED, State.PROMOTED))


def find(database: Database, prefix: str) -> tuple[Record, State]:
    """The record whose id starts with `prefix`; DatabaseError if there is none, or several."""
    with database.reading() as connection:
        return record_of(_row(connection, database, prefix), database.name)


def select_where(database: Database, state: str | None = None) -> list[tuple[Record, State]]:
    """All records, or all of a state, by workload."""
    statement = select_records().order_by(records.c.workload_id, records.c.median_us)
    if state is not None:
        statement = statement.where(records.c.state == state)
    with database.reading() as connection:
        return [record_of(row, database.name) for row in connection.execute(statement)]


def count(database: Database, how: How = How.MEASURED) -> dict[str, int]:
    """How many measured (or estimated) records are in each state."""
    with database.reading() as connection:
        counted = select(records.c.state, func.count()).where(records.c.how == how).group_by(records.c.state)
        found = {row[0]: int(row[1]) for row in connection.execute(counted)}
    return {state.value: found.get(state, 0) for state in State}


def _row(connection: Connection, database: Database, prefix: str) -> Any:
    statement = select_records().where(records.c.id.startswith(prefix, autoescape=True)).order_by(records.c.id).limit(2)
    found = connection.execute(statement).all() if prefix else []
    if len(found) != 1:
        raise DatabaseError(
            f"{database.name}: {'several records start' if found else 'no record starts'} with {prefix!r}; see: db list"
        )
    return found[0]


def _move(database: Database, prefix: str, to: State, from_: tuple[State, ...]) -> str:
    with database.writing() as connection:
        _lock(connection, {_row(connection, database, prefix).workload_id})
        row = _row(connection, database, prefix)
        if State(row.state) not in from_:
            needed = " or ".join(from_)
            hint = f"; it takes measurements on {HOSTS} hosts to verify it" if row.state == State.CANDIDATE else ""
            estimate = "an estimate and " if row.how == How.ESTIMATED else ""
            raise DatabaseError(
                f"{database.name}: record {row.id[:12]} is {estimate}{row.state}, "
                f"only what is {needed} can be {to}{hint}"
            )
        same = and_(*(column == row._mapping[column.name] for column in GROUP))
        connection.execute(update(records).where(same).values(state=to))
        _settle(connection, {tuple(row._mapping[column.name] for column in GROUP)})
        return str(row.id)


def _lock(connection: Connection, workload_ids: set[int]) -> None:
    """Let nobody else write records of these workloads until the transaction ends; always in the same order."""
    ordered = sorted(workload_ids)
    for start in range(0, len(ordered), CHUNK):
        ids = workloads.c.id.in_(ordered[start : start + CHUNK])
        connection.execute(select(workloads.c.id).where(ids).order_by(workloads.c.id).with_for_update()).all()


def _states_of(ids: Sequence[str]) -> Any:
    return select(records.c.id, records.c.state).where(records.c.id.in_(ids))


def _set(connection: Connection, states: Sequence[tuple[str, State]]) -> None:
    if states:
        statement = update(records).where(records.c.id == bindparam("key")).values(state=bindparam("to"))
        connection.execute(statement, [{"key": key, "to": to} for key, to in states])


def _schedule(row: Any) -> tuple[int, int, str]:
    """Which schedule a row is of, measured or estimated."""
    return row.workload_id, row.target_id, row.schedule_digest


def _settle(connection: Connection, groups: set[tuple[Any, ...]]) -> None:
    """Give all measured records of a schedule one state: the latest of theirs, and verified if on enough hosts.

    An estimate keeps its own, but that it is retired where the schedule is as measured.
    """
    hosts = func.count(distinct(records.c.host)).label("hosts")
    latest, first = func.max(RANK).label("latest"), func.min(RANK).label("first")
    workload_ids = sorted({group[0] for group in groups})
    # One of few groups is asked for by its key; of many, all those of the workloads are looked through.
    digests = sorted({group[3] for group in groups}) if len(groups) <= CHUNK else None
    changes = []
    for start in range(0, len(workload_ids), CHUNK):
        statement = select(*GROUP, hosts, latest, first).group_by(*GROUP)
        statement = statement.where(records.c.workload_id.in_(workload_ids[start : start + CHUNK]))
        if digests is not None:
            statement = statement.where(records.c.schedule_digest.in_(digests))
        found = connection.execute(statement).all()
        retired = {_schedule(row) for row in found if row.how == How.MEASURED and row.latest == RETIRED}
        for row in found:
            if row.how == How.ESTIMATED:
                rank = RETIRED if _schedule(row) in retired else row.first
            else:
                rank = max(row.latest, STATES.index(State.VERIFIED)) if row.hosts >= HOSTS else row.latest
            if row.first < rank:
                changes.append(
                    {f"_{column.name}": row._mapping[column.name] for column in GROUP} | {"to": STATES[rank]}
                )
    if changes:
        same = and_(*(column == bindparam(f"_{column.name}") for column in GROUP))
        connection.execute(update(records).where(same).values(state=bindparam("to")), changes)
