"""Texts stored once: a row is found by digest *and* text, so that a collision of digests gives no wrong answer."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table, select
from sqlalchemy.dialects import postgresql, sqlite

from .fingerprint import Fingerprint
from .schema import targets


def find(connection: Connection, table: Table, digest: str, text: str) -> int | None:
    """The id of the row that holds `text`, if there is one."""
    statement = select(table.c.id, table.c.text).where(table.c.digest == digest)
    return next((row.id for row in connection.execute(statement) if row.text == text), None)


def intern(connection: Connection, table: Table, digest: str, text: str, **columns: Any) -> int:
    """The id of the row that holds `text`, made if there is none; safe beside other writers."""
    ordinal = 0
    while (found := find(connection, table, digest, text)) is None:
        row = {"digest": digest, "ordinal": ordinal, "text": text, **columns}
        connection.execute(insert_new(connection, table).values(row))
        ordinal += 1  # should the place be taken by another text
    return found


def intern_machine(connection: Connection, machine: Fingerprint) -> int:
    """The id of a machine among the targets."""
    return intern(connection, targets, machine.key, machine.text, kind=machine.kind, arch=machine.arch)


def insert_new(connection: Connection, table: Table) -> Any:
    """An INSERT that leaves rows alone whose key is there already."""
    dialect = {"sqlite": sqlite, "postgresql": postgresql}[connection.dialect.name]
    return dialect.insert(table).on_conflict_do_nothing()
