"""PostgreSQL's roles: who may read (builders), who may also write (workers); the owner does the rest."""

from __future__ import annotations

from sqlalchemy import text

from vllm_compile.errors import DatabaseError

from .home import Database
from .schema import metadata, records, searches, targets, tasks, workloads

READER, WRITER = "vllm_compile_reader", "vllm_compile_writer"


def create_roles(database: Database) -> tuple[str, str]:
    """Make the two roles, or bring their rights up to date; accounts get them by GRANT; gives their names.

    A reader sees everything but the tokens' digests.  A writer adds and changes records, tasks and searches; it can
    neither make tokens nor delete anything.

    Raises:
        DatabaseError: SQLite, which has no roles; or this account may not make any.
    """
    if database.is_sqlite:
        raise DatabaseError(f"{database.name}: SQLite has no roles; use the file's permissions")
    with database.writing() as connection:
        for role in (READER, WRITER):
            if connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}) is None:
                connection.execute(text(f"CREATE ROLE {role} NOLOGIN"))
            connection.execute(text(f"GRANT USAGE ON SCHEMA public TO {role}"))
            readable = [name for name in (*metadata.tables, "alembic_version") if name != "tokens"]
            connection.execute(text(f"GRANT SELECT ON {', '.join(readable)} TO {role}"))
        written = ", ".join(table.name for table in (workloads, targets, records, searches, tasks))
        connection.execute(text(f"GRANT INSERT, UPDATE ON {written} TO {WRITER}"))
        connection.execute(text(f"GRANT SELECT ON tokens TO {WRITER}"))
        connection.execute(text(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {WRITER}"))
    return READER, WRITER
