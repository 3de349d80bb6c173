"""Records as rows of the table, and back."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, Select, select

from vllm_compile.errors import DatabaseError

from .fingerprint import Fingerprint
from .record import How, Provenance, Record, Schedule, ScheduleKind, State, Times, Verdict
from .schema import records, targets, workloads
from .workload import Workload


def row_of(record: Record, workload_id: int, target_id: int, state: State) -> dict[str, Any]:
    """The columns of a record that `check` lets pass."""
    times, verdict, provenance = record.times, record.verdict, record.provenance
    return {
        "id": record.id,
        "workload_id": workload_id,
        "target_id": target_id,
        "schedule_kind": record.schedule.kind,
        "schedule_digest": record.schedule.key,
        "schedule": record.schedule.text,
        "how": record.how,
        "median_us": times.median,
        "p10_us": times.p10,
        "p90_us": times.p90,
        "gb_per_s": record.gb_per_s,
        "roofline_share": record.roofline_share,
        "error": None if verdict is None else verdict.error,
        "tolerance": None if verdict is None else verdict.tolerance,
        "executed_on": None if verdict is None else verdict.executed_on,
        "author": provenance.author,
        "measured_at": provenance.measured_at,
        "host": provenance.host,
        "source_commit": provenance.commit,
        "state": state,
    }


def select_records() -> Select[Any]:
    """Records with the texts of workload and target: what `record_of` reads."""
    return (
        select(records, workloads.c.text.label("workload_text"), targets.c.text.label("target_text"))
        .join(workloads, records.c.workload_id == workloads.c.id)
        .join(targets, records.c.target_id == targets.c.id)
    )


def record_of(row: Row[Any], name: str) -> tuple[Record, State]:
    """The record in a row of `select_records`, checked against its id, and its state.

    Raises:
        DatabaseError: the row is not what was committed; `name` says in which database.
    """
    try:
        record = Record(
            Workload.from_text(row.workload_text),
            Fingerprint.from_text(row.target_text),
            Schedule(ScheduleKind(row.schedule_kind), row.schedule),
            How(row.how),
            Times(row.median_us, row.p10_us, row.p90_us),
            row.gb_per_s,
            row.roofline_share,
            None if row.executed_on is None else Verdict(row.error, row.tolerance, row.executed_on),
            Provenance(row.author, row.measured_at, row.host, row.source_commit),
        )
        intact, state = record.id == row.id, State(row.state)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(name, row.id, str(error)) from error
    if not intact:
        raise _damaged(name, row.id, "its SHA-256 differs")
    return record, state


def machine_of(row: Any, name: str) -> Fingerprint:
    """The machine that a row of the table of targets (`id`, `text`) has; DatabaseError, as above, if it has none."""
    try:
        return Fingerprint.from_text(row.text)
    except ValueError as error:
        raise _damaged(name, row.id, str(error), "machine") from error


def _damaged(name: str, row: object, reason: str, what: str = "record") -> DatabaseError:
    return DatabaseError(
        f"{name}: {what} {str(row)[:12]} is not what was committed ({reason}); "
        "restore the database from a bundle, or read what is left: db export --salvage"
    )
