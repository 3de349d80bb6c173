"""Write tokens: once a team has one, only those who show one may write.

A token is 256 random bits, shown once.  What is stored is its SHA-256: there is no dictionary of 256-bit numbers to
try, so that a slow hash would guard against nothing.  Tokens keep clients of this program from writing by mistake;
what keeps anybody else from it are the server's roles (roles.py).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from sqlalchemy import insert, select, update

from vllm_compile.canonical import sha256
from vllm_compile.errors import DatabaseError

from .clock import now
from .home import Database
from .schema import tokens


@dataclass(frozen=True)
class Token:
    """What is known of a token; times are Unix seconds."""

    id: int
    team: str
    created_at: float
    revoked_at: float | None


def create(database: Database, team: str) -> str:
    """A new token of `team`: the only time that it can be seen."""
    token = secrets.token_urlsafe(32)
    with database.writing() as connection:
        connection.execute(insert(tokens).values(team=team, digest=sha256(token), created_at=now()))
    return token


def all_tokens(database: Database) -> list[Token]:
    """Every token there was, by number."""
    columns = (tokens.c.id, tokens.c.team, tokens.c.created_at, tokens.c.revoked_at)
    with database.reading() as connection:
        return [Token(*row) for row in connection.execute(select(*columns).order_by(tokens.c.id))]


def revoke(database: Database, number: int) -> None:
    """End a token.

    Raises:
        DatabaseError: there is no such token; or it is the last, without which anybody could write.
    """
    with database.writing() as connection:
        active = set(connection.scalars(select(tokens.c.id).where(tokens.c.revoked_at.is_(None))))
        if number not in active:
            raise DatabaseError(f"{database.name}: no token {number} is in force; see: db token list")
        if active == {number}:
            raise DatabaseError(f"{database.name}: token {number} is the last one in force; create another first")
        connection.execute(update(tokens).where(tokens.c.id == number).values(revoked_at=now()))
