"""The two homes of a database, a SQLite file and a PostgreSQL server, opened and written to in the same way."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import sqlalchemy
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from vllm_compile.errors import DatabaseError

from . import migrate
from .authorise import authorise
from .failures import DAMAGED, reported

BUSY_SECONDS = 60  # SQLite: how long to wait for another process's transaction
CONNECT_SECONDS = 10


class Database:
    """An open database; `reading` and `writing` give transactions."""

    def __init__(self, engine: Engine, name: str, writable: bool, token: str | None) -> None:
        self.engine = engine
        self.name = name
        self.writable = writable
        self._token = token

    @property
    def is_sqlite(self) -> bool:
        return self.engine.dialect.name == "sqlite"

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that reads."""
        with reported(self.name), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that is committed at the end, or has no effect.

        Raises:
            DatabaseError: opened for reading; or teams have tokens here and ours is none of them.
        """
        if not self.writable:
            raise DatabaseError(f"{self.name}: opened for reading; open it for writing")
        with reported(self.name), self.engine.begin() as connection:
            authorise(connection, self._token, self.name)
            yield connection

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def open_database(url: str | Path, writable: bool = True, token: str | None = None, salvage: bool = False) -> Database:
    """Open a database; an empty one gets its tables if it is opened for writing.

    Args:
        url: a file's path, `sqlite:///path`, or `postgresql://user:password@host:port/name`.
        writable: False opens it so that nothing can be changed.
        token: a team's, where the database has tokens.
        salvage: read also what is left of a torn SQLite file, of an older schema too if its columns are the same.

    Raises:
        UnreachableError: no server answers, or it does not let us in.
        DatabaseError: no database there, damaged, of another schema, or an URL of another kind.
    """
    parsed = _parse(url)
    name = parsed.database or "" if parsed.drivername == "sqlite" else parsed.render_as_string(hide_password=True)
    engine = _engine(parsed, name, writable, salvage)
    try:
        with reported(name):
            if writable:
                _check_pages(engine, name)
            migrate.require_current(engine, name, writable, salvage)
            if parsed.drivername == "sqlite" and writable:
                _use_wal(engine)
    except BaseException:
        engine.dispose()
        raise
    return Database(engine, name, writable, token)


def migrate_database(url: str | Path) -> str:
    """Bring a database's tables to this version's schema; gives the schema's name.

    Raises:
        DatabaseError: as `open_database`.
    """
    parsed = _parse(url)
    name = parsed.database or "" if parsed.drivername == "sqlite" else parsed.render_as_string(hide_password=True)
    engine = _engine(parsed, name, writable=True)
    try:
        with reported(name):
            _check_pages(engine, name)  # what is missing would be missing from a sound file
            return migrate.upgrade(engine, name)
    finally:
        engine.dispose()


def _parse(url: str | Path) -> URL:
    text = str(url)
    if "://" not in text:
        return URL.create("sqlite", database=text)
    try:
        parsed = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise DatabaseError(f"not a database URL ({error}); it is postgresql://USER:PASSWORD@HOST:PORT/NAME") from error
    if parsed.drivername == "sqlite" and parsed.database:
        return parsed
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    raise DatabaseError(
        f"{parsed.render_as_string()}: a tuning database is a file's path, sqlite:///PATH, "
        "or postgresql://USER:PASSWORD@HOST/NAME"
    )


def _engine(url: URL, name: str, writable: bool, salvage: bool = False) -> Engine:
    if url.drivername == "sqlite":
        if not writable and not Path(name).is_file():
            raise DatabaseError(f"{name}: no tuning database here; check the path")
        if not Path(name).parent.is_dir():
            raise DatabaseError(f"{name}: its directory does not exist; make it first")
        return _sqlite_engine(name, writable, salvage)
    options = "" if writable else "-c default_transaction_read_only=on"
    arguments: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "options": options}
    try:
        # pre_ping: after a restart of the server, old connections are replaced rather than used.
        return sqlalchemy.create_engine(url, connect_args=arguments, pool_pre_ping=True)
    except ModuleNotFoundError as error:
        raise DatabaseError(f"{name}: needs {error.name}; pip install 'vllm-compile[postgres]'") from error


def _sqlite_engine(name: str, writable: bool, salvage: bool) -> Engine:
    uri = Path(name).absolute().as_uri() + ("?mode=rwc" if writable else "?mode=ro")
    creator_url = URL.create("sqlite", database=f"{uri}", query={"uri": "true"})
    engine = sqlalchemy.create_engine(creator_url, connect_args={"timeout": BUSY_SECONDS})

    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver's guess
        connection.execute("PRAGMA foreign_keys = ON")
        if salvage and not writable:  # SQLite's word for: do not refuse a file that is too short
            connection.execute("PRAGMA writable_schema = ON")

    # IMMEDIATE: a transaction that reads first and writes then cannot be refused half-way.
    begin = functools.partial(Connection.exec_driver_sql, statement="BEGIN IMMEDIATE" if writable else "BEGIN")
    event.listen(engine, "connect", connected)
    event.listen(engine, "begin", begin)
    return engine


def _use_wal(engine: Engine) -> None:
    """Readers beside a writer; the file keeps the mode, so that it is set only once it is known to be ours."""
    connection = engine.raw_connection()  # not within a transaction
    try:
        connection.cursor().execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


def _check_pages(engine: Engine, name: str) -> None:
    """Refuse a damaged SQLite file before anything is written to it."""
    if engine.dialect.name != "sqlite" or not Path(name).exists():
        return
    with engine.connect() as connection:
        answers = connection.exec_driver_sql("PRAGMA quick_check(1)").scalars().all()
    if answers != ["ok"]:
        raise DatabaseError(f"{name}: {DAMAGED} ({' '.join(str(answers[0]).split())})")
