"""Both homes of the database: a SQLite file, and a database of a PostgreSQL server that runs for these tests."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path

import pytest

from vllm_compile.schedules.database import open_database

from .postgres import Server, binaries


@pytest.fixture(scope="session")
def server():
    commands = binaries()
    if commands is None:
        assert "REQUIRE_POSTGRES" not in os.environ, "install Debian's package postgresql"
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    directory = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are closed to other accounts
    running = Server(directory, commands)
    yield running
    running.stop("immediate")
    shutil.rmtree(directory)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """The URL of a new database, in either home."""
    if request.param == "sqlite":
        return str(tmp_path / "tuning.db")
    return request.getfixturevalue("server").create(f"tuning_{secrets.token_hex(4)}")


@pytest.fixture
def database(url):
    with open_database(url) as opened:
        yield opened
