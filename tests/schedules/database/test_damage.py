"""Damaged and foreign files: refused, left as they are, and what is whole in them can be read."""

from __future__ import annotations

import random
import sqlite3
from pathlib import Path

import pytest

from tests.conftest import SEED
from vllm_compile.errors import DatabaseError
from vllm_compile.schedules.database import commit, open_database
from vllm_compile.schedules.database.bundle import export_bundle, import_bundle
from vllm_compile.schedules.database.home import migrate_database

from .samples import random_records

RECORDS = 2000
PAGE = 4096


@pytest.fixture
def path(tmp_path) -> Path:
    made = tmp_path / "tuning.db"
    with open_database(made) as database:
        commit(database, random_records(SEED, RECORDS))
    return made


def torn(content: bytearray) -> bytearray:
    return content[: len(content) * 2 // 3]


def scribbled(content: bytearray) -> bytearray:
    """Random bytes over one page in ten of the last half."""
    rng, pages = random.Random(SEED), len(content) // PAGE
    for page in rng.sample(range(pages // 2, pages), pages // 20):
        content[page * PAGE : (page + 1) * PAGE] = rng.randbytes(PAGE)
    return content


@pytest.mark.parametrize("damage", [torn, scribbled])
def test_refused_and_the_rest_readable(path, tmp_path, damage):
    content = bytes(damage(bytearray(path.read_bytes())))
    path.write_bytes(content)
    with pytest.raises(DatabaseError, match=r"damaged, nothing is written to it.* --salvage"):
        open_database(path)
    with pytest.raises(DatabaseError, match="damaged, nothing is written to it"):
        migrate_database(path)
    assert path.read_bytes() == content
    with open_database(path, writable=False, salvage=True) as reader:
        with pytest.raises(DatabaseError, match=r"damaged|not what was committed"):
            export_bundle(reader, tmp_path / "whole.bundle")
        saved, lost = export_bundle(reader, tmp_path / "saved.bundle", salvage=True)
    assert not (tmp_path / "whole.bundle").exists()
    assert 0 < saved < RECORDS
    print(f"{saved} records of {RECORDS} saved, {lost} known to be lost")
    assert path.read_bytes() == content
    with open_database(tmp_path / "new.db") as restored:
        assert import_bundle(restored, tmp_path / "saved.bundle") == (saved, saved)


def test_a_sound_file_is_not_refused(path, tmp_path):
    with open_database(path) as database:
        assert export_bundle(database, tmp_path / "a.bundle", salvage=True) == (RECORDS, 0)


def test_another_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("These are notes.\n" * 100)
    for writable in (True, False):
        with pytest.raises(DatabaseError, match="not a SQLite database"):
            open_database(path, writable)
    assert path.read_text() == "These are notes.\n" * 100


def test_a_database_of_something_else(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE notes (text)")
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match=r"a database of something else \(tables notes\)"):
        open_database(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nowhere/tuning.db", "its directory does not exist"),
        ("mysql://host/name", "a tuning database is a file's path"),
        ("sqlite://", "a tuning database is a file's path"),
        ("postgresql://host:port/name", "not a database URL"),
    ],
)
def test_urls(url, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatabaseError, match=words):
        open_database(url)
    assert list(tmp_path.iterdir()) == []


def test_reading_makes_no_file(tmp_path):
    with pytest.raises(DatabaseError, match="no tuning database here"):
        open_database(tmp_path / "tuning.db", writable=False)
    assert list(tmp_path.iterdir()) == []
