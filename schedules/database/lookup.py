"""The best schedule known for a workload on a machine, and how much the answer is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Select, bindparam, case, literal, select, union_all

from . import intern
from .fingerprint import Fingerprint
from .home import Database
from .record import How, Record, State
from .rows import machine_of, record_of, select_records
from .schema import records, targets, workloads
from .workload import Workload

PREFERENCE = (State.PROMOTED, State.VERIFIED, State.CANDIDATE)


class Match(StrEnum):
    """How alike the machine of a record is to the one asked for."""

    EXACT = "exact"
    ARCHITECTURE = "architecture"  # same kind and architecture


@dataclass(frozen=True)
class Answer:
    """A record, and why it was chosen.

    Attributes:
        changed: what is different here and makes the record stale (`driver`, `tvm`, `intrinsics`); empty if fresh.
    """

    record: Record
    state: State
    match: Match
    changed: tuple[str, ...]

    @property
    def stale(self) -> bool:
        return bool(self.changed)


def lookup(
    database: Database,
    workload: Workload,
    target: Fingerprint,
    hows: Sequence[How] = (How.MEASURED,),
    usable: Callable[[Record], bool] = lambda record: True,
) -> Answer | None:
    """The best record of exactly this workload that is not retired, and is `usable`; None if there is none.

    Machines: first exactly this one, then fresh records of the same kind and architecture, then stale ones; never
    another architecture.  Of those, promoted schedules come first, then verified ones, then candidates; of these the
    fastest.  Estimates are given only if `hows` names them, after what it names before them.  `usable` is asked outside
    of transactions: it may take its time.

    Raises:
        DatabaseError: the record found is damaged.
    """
    with database.reading() as connection:
        workload_id = intern.find(connection, workloads, workload.key, workload.text)
        if workload_id is None:
            return None
        exact, fresh, stale = _machines(connection, target, database.name)
    for how in hows:
        for machines in (exact, fresh, stale):
            for row in _in_order(database, workload_id, list(machines), how):
                record, state = record_of(row, database.name)
                if usable(record):
                    match = Match.EXACT if machines is exact else Match.ARCHITECTURE
                    return Answer(record, state, match, target.changed_since(record.target))
    return None


def _machines(connection: Connection, target: Fingerprint, name: str) -> tuple[set[int], set[int], set[int]]:
    """Ids of targets: this very one, fresh ones of its architecture, stale ones."""
    alike = select(targets.c.id, targets.c.text).where(targets.c.kind == target.kind, targets.c.arch == target.arch)
    exact: set[int] = set()
    fresh: set[int] = set()
    stale: set[int] = set()
    for row in connection.execute(alike):
        other = machine_of(row, name)
        group = exact if other == target else stale if target.changed_since(other) else fresh
        group.add(row.id)
    return exact, fresh, stale


def _first(state: State, rank: int) -> Select[Any]:
    """The fastest record of a state, which is the first entry of an index."""
    first = (
        select(records.c.id, literal(rank).label("rank"))
        .where(records.c.workload_id == bindparam("workload"))
        .where(records.c.target_id.in_(bindparam("machines", expanding=True)))
        .where(records.c.how == bindparam("how"), records.c.state == state)
        .order_by(records.c.median_us, records.c.id)
        .limit(1)
        .subquery()
    )
    return select(first.c.id, first.c.rank)


def _preferred() -> Select[Any]:
    firsts = union_all(*(_first(state, rank) for rank, state in enumerate(PREFERENCE))).subquery()
    best = select(firsts.c.id).order_by(firsts.c.rank).limit(1).scalar_subquery()
    return select_records().where(records.c.id == best)


PREFERRED = _preferred()  # built once: that takes longer than to run it


def _in_order(database: Database, workload_id: int, machines: Sequence[int], how: How) -> Iterator[Any]:
    """Rows by preference: the first by an index; the others, which hardly anybody asks for, by looking through all.

    No transaction is open while the caller looks at one.
    """
    if not machines:
        return
    with database.reading() as connection:
        first = connection.execute(PREFERRED, {"workload": workload_id, "machines": machines, "how": how}).first()
    if first is None:
        return
    yield first
    rank = case({state.value: rank for rank, state in enumerate(PREFERENCE)}, value=records.c.state)
    others = (
        select_records()
        .where(records.c.workload_id == workload_id, records.c.target_id.in_(machines), records.c.how == how)
        .where(records.c.state.in_(PREFERENCE), records.c.id != first.id)
        .order_by(rank, records.c.median_us, records.c.id)
    )
    with database.reading() as connection:
        rows = connection.execute(others).all()
    yield from rows
