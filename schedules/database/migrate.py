"""Schemas: which one a database has, and the way to this version's (Alembic)."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from vllm_compile.errors import DatabaseError

SAME_COLUMNS = {"0001", "0002", "0003"}  # older schemas whose records are read as this version's are
LOCK = 7_043_001_377  # PostgreSQL's advisory lock of whoever migrates; any number nobody else uses


def require_current(engine: Engine, name: str, writable: bool, salvage: bool = False) -> None:
    """Check that the database has this version's schema; make it in an empty one that may be written to.

    `salvage` lets an older one pass that can be read: a damaged file is not migrated.

    Raises:
        DatabaseError: it has another one.
    """
    with engine.begin() as connection:
        found = _revision(connection, name)
    if found is None and writable:
        upgrade(engine, name)
    elif found is None:
        raise DatabaseError(f"{name}: no tuning database here; import a bundle or tune into it first")
    elif found != _scripts().get_current_head() and not (salvage and not writable and found in SAME_COLUMNS):
        raise DatabaseError(f"{name}: its schema ({found}) is older than this version's; run: vllm-compile db migrate")


def upgrade(engine: Engine, name: str) -> str:
    """Run the migrations that are missing, one process at a time; gives the schema's name."""
    config = _config()
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        _revision(connection, name)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        head = _scripts().get_current_head()
    assert head is not None
    return head


def _revision(connection: Connection, name: str) -> str | None:
    """The schema's name, None in an empty database; DatabaseError if this version does not know it."""
    revision = MigrationContext.configure(connection).get_current_revision()
    if revision is None:
        if tables := inspect(connection).get_table_names():
            raise DatabaseError(f"{name}: a database of something else (tables {', '.join(tables[:3])}); name another")
        return None
    if revision not in {script.revision for script in _scripts().walk_revisions()}:
        raise DatabaseError(f"{name}: its schema ({revision}) is newer than this version's; update vllm-compile")
    return revision


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())
