"""Who may write to a database that has tokens (tokens.py): whoever shows one."""

from __future__ import annotations

from sqlalchemy import Connection, select

from vllm_compile.canonical import sha256
from vllm_compile.errors import DatabaseError

from .schema import tokens

VARIABLE = "VLLM_COMPILE_DB_TOKEN"


def authorise(connection: Connection, token: str | None, name: str) -> None:
    """Raise DatabaseError if tokens are in force and `token` is none of them."""
    in_force = set(connection.scalars(select(tokens.c.digest).where(tokens.c.revoked_at.is_(None))))
    if in_force and (token is None or sha256(token) not in in_force):
        what = "needs a token to write" if token is None else "does not know this token"
        raise DatabaseError(f"{name}: {what}; set {VARIABLE} to your team's (made by: db token create TEAM)")
