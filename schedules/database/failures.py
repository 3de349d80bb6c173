"""What a database's driver says when something fails, in words that a user can act on."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError

from vllm_compile.errors import DatabaseError, UnreachableError

DAMAGED = "the file is damaged, nothing is written to it; restore it, or read what is left: db export --salvage"

SQLITE = {
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_NOTADB: "not a SQLite database; nothing was written; name another file",
    sqlite3.SQLITE_READONLY: "may not be written to; ask for write access, or work on a copy",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; check that it exists, and that its directory may be written to",
    sqlite3.SQLITE_FULL: "the disk is full; make room and repeat the command",
    sqlite3.SQLITE_IOERR: "the disk does not read or write; check it, or copy the file to another",
    sqlite3.SQLITE_PERM: "may not be accessed; check the file's permissions",
}
SQLITE_RETRY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

POSTGRES = {
    "42501": "this account may not do that; see docs/tuning-database.md for the roles",
    "25006": "opened for reading, or a read-only server; open it for writing",
    "53100": "the server's disk is full",
    "XX001": "the server found damaged data; restore it from a backup or a bundle",
    "XX002": "the server found a damaged index; have its administrator run REINDEX",
}
# Classes of SQLSTATE that say: once more, please (connection, transaction, resources, the operator stops the server).
POSTGRES_RETRY = ("08", "40", "53", "57")


@contextmanager
def reported(name: str) -> Iterator[None]:
    """Turn the driver's errors into ours; `name` is how people call the database.

    Raises:
        UnreachableError: it does not answer, for now.
        DatabaseError: it refuses.
    """
    try:
        yield
    except DBAPIError as error:
        raise _translated(name, error) from error


def _translated(name: str, error: DBAPIError) -> DatabaseError:
    cause = error.orig
    said = " ".join(str(cause).split())
    if isinstance(cause, sqlite3.Error):
        code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # without the extension
        if code in SQLITE_RETRY:
            return UnreachableError(f"{name}: another process has it locked ({said}); repeat the command")
        return DatabaseError(f"{name}: {SQLITE.get(code, 'SQLite refuses')} ({said})")
    state = getattr(cause, "sqlstate", None)
    if state is None:  # no server, or it does not let us in: its own words say which
        return UnreachableError(
            f"{name}: cannot connect ({said}); check that the server runs, and the URL's host, user, password, database"
        )
    if state in POSTGRES:
        return DatabaseError(f"{name}: {POSTGRES[state]} ({said})")
    if state.startswith(POSTGRES_RETRY):
        return UnreachableError(f"{name}: the server does not answer now ({said}); repeat the command")
    return DatabaseError(f"{name}: the server refuses ({said})")
