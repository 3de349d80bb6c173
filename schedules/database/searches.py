"""How far searches for schedules have come, beside the records they leave: what failed, and which came to their end.

A search is of a call, on a machine, in a space (its digest): where one of them changes, it is another search.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, select, update

from vllm_compile.canonical import canonical

from . import intern
from .fingerprint import Fingerprint
from .home import Database
from .schema import searches, targets, workloads
from .workload import Workload


@dataclass(frozen=True)
class Search:
    """Attributes:
    asked: the most candidates that one has been asked for which came to its end; 0 if none did.
    failed: SHA-256 of schedules whose result was wrong, or that ended their process: there is no record of them.
    """

    asked: int = 0
    failed: frozenset[str] = frozenset()


def search_of(database: Database, workload: Workload, machine: Fingerprint, space: str) -> Search:
    """What is known of it; nothing of one that never was."""
    with database.reading() as connection:
        call = intern.find(connection, workloads, workload.key, workload.text)
        target = intern.find(connection, targets, machine.key, machine.text)
        row = connection.execute(select(searches).where(_is(call, target, space))).first()
    return Search() if row is None else Search(row.asked, frozenset(json.loads(row.failed)))


def note(
    database: Database,
    workload: Workload,
    machine: Fingerprint,
    space: str,
    asked: int = 0,
    failed: Collection[str] = (),
) -> None:
    """Add to what is known of a search; nothing is taken back, whoever else searches at the same time."""
    with database.writing() as connection:
        call = intern.intern(connection, workloads, workload.key, workload.text)
        target = intern.intern_machine(connection, machine)
        new = {"workload_id": call, "target_id": target, "space": space, "asked": 0, "failed": "[]"}
        connection.execute(intern.insert_new(connection, searches).values(new))
        row = connection.execute(select(searches).where(_is(call, target, space)).with_for_update()).one()
        more = {"asked": max(row.asked, asked), "failed": canonical(sorted({*json.loads(row.failed), *failed}))}
        connection.execute(update(searches).where(_is(call, target, space)).values(more))


def _is(call: int | None, target: int | None, space: str) -> Any:
    return and_(searches.c.workload_id == call, searches.c.target_id == target, searches.c.space == space)
