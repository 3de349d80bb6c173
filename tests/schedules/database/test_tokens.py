"""Who may write: tokens in both homes, roles on a server."""

from __future__ import annotations

import secrets

import pytest
import sqlalchemy

from vllm_compile.errors import DatabaseError, UnreachableError
from vllm_compile.schedules.database import commit, lookup, open_database, tokens
from vllm_compile.schedules.database.roles import READER, WRITER, create_roles
from vllm_compile.schedules.database.tasks import lease, submit

from .samples import H200, linear, record


def test_once_there_is_a_token_it_takes_one(database, url):
    commit(database, [record()])
    token = tokens.create(database, "kernels")
    with pytest.raises(DatabaseError, match="needs a token to write"):
        commit(database, [record(us=3)])
    with open_database(url, token="guess") as guesser, pytest.raises(DatabaseError, match="does not know this token"):
        submit(guesser, "kind", [1])
    with open_database(url, token=token) as team:
        commit(team, [record(us=3)])
        assert lookup(team, linear(), H200).record.times.median == 3
    assert lookup(database, linear(), H200) is not None  # reading needs none


def test_only_its_digest_is_stored(database):
    token = tokens.create(database, "kernels")
    with database.engine.connect() as connection:
        stored = str(connection.exec_driver_sql("SELECT * FROM tokens").all())
    assert token not in stored
    assert "kernels" in stored


def test_revoked(database, url):
    first = tokens.create(database, "kernels")
    with open_database(url, token=first) as team:
        second = tokens.create(team, "serving")
        tokens.revoke(team, 1)
        with pytest.raises(DatabaseError, match="does not know this token"):
            commit(team, [record()])
    with open_database(url, token=second) as team:
        commit(team, [record()])
        with pytest.raises(DatabaseError, match="is the last one in force"):
            tokens.revoke(team, 2)
        with pytest.raises(DatabaseError, match="no token 1 is in force"):
            tokens.revoke(team, 1)
        assert [(t.team, t.revoked_at is None) for t in tokens.all_tokens(team)] == [
            ("kernels", False),
            ("serving", True),
        ]


@pytest.fixture
def shared(server):
    """A database with roles, and the URLs of a builder, a worker, and a stranger without a role."""
    name = f"tuning_{secrets.token_hex(4)}"
    url = server.create(name)
    with open_database(url) as owner:
        commit(owner, [record()])
        create_roles(owner)
        create_roles(owner)  # once more is no error
    urls = {}
    for account, role in (("builder", READER), ("worker", WRITER), ("stranger", None)):
        user = f"{account}_{name}"
        grant = [f"GRANT {role} TO {user}"] if role else []
        server.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'secret'", *grant)
        urls[account] = server.url(name, user, "secret")
    return urls


def test_a_reader_reads(shared):
    with open_database(shared["builder"], writable=False) as builder:
        assert lookup(builder, linear(), H200) is not None
    with open_database(shared["builder"]) as builder:
        with pytest.raises(DatabaseError, match="this account may not do that"):
            commit(builder, [record(us=3)])
        with pytest.raises(sqlalchemy.exc.ProgrammingError), builder.engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO workloads (digest, ordinal, text) VALUES ('', 0, '')")
        with pytest.raises(sqlalchemy.exc.ProgrammingError), builder.engine.begin() as connection:
            connection.exec_driver_sql("SELECT * FROM tokens")


def test_a_writer_writes_but_makes_no_tokens(shared):
    with open_database(shared["worker"]) as worker:
        commit(worker, [record(us=3)])
        submit(worker, "kind", [1])
        assert lease(worker, "w", ["kind"], 10) is not None
        with pytest.raises(DatabaseError, match="this account may not do that"):
            tokens.create(worker, "mine")


def test_a_stranger_does_not_even_read(shared):
    with pytest.raises(DatabaseError, match="this account may not do that"):
        open_database(shared["stranger"], writable=False)


def test_wrong_password(server):
    with pytest.raises(UnreachableError, match="password authentication failed") as refused:
        open_database(server.url("postgres", password="wrong"))
    assert "\n" not in str(refused.value)
    assert "wrong" not in str(refused.value)


def test_no_server():
    with pytest.raises(UnreachableError, match=r"127.0.0.1:9/x: cannot connect \(.*check that the server runs"):
        open_database("postgresql://owner:hidden@127.0.0.1:9/x")
