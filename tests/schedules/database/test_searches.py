"""What is known of searches only grows, and is of one call, machine and space."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from vllm_compile.errors import DatabaseError
from vllm_compile.schedules.database import open_database
from vllm_compile.schedules.database.searches import Search, note, search_of

from .samples import CPU, H200, linear

SPACE = "5" * 64


def test_nothing_is_taken_back(database, url):
    assert search_of(database, linear(), CPU, SPACE) == Search(0, frozenset())
    note(database, linear(), CPU, SPACE, failed=["b", "a"])
    note(database, linear(), CPU, SPACE, asked=16)
    note(database, linear(), CPU, SPACE, asked=8, failed=["c"])
    with open_database(url, writable=False) as reader:
        assert search_of(reader, linear(), CPU, SPACE) == Search(16, frozenset("abc"))
        with pytest.raises(DatabaseError, match="opened for reading"):
            note(reader, linear(), CPU, SPACE, asked=99)


def test_another_call_machine_or_space_is_another_search(database):
    note(database, linear(), CPU, SPACE, asked=16)
    for other in (
        (linear(N=64), CPU, SPACE),
        (linear(), H200, SPACE),
        (linear(), replace(CPU, tvm="newer"), SPACE),
        (linear(), CPU, "6" * 64),
    ):
        assert search_of(database, *other) == Search()
    assert search_of(database, linear(), CPU, SPACE).asked == 16


def test_two_searches_at_the_same_time(url):
    """What each of them notes is there in the end."""

    def notes(number):
        with open_database(url) as database:
            for n in range(20):
                note(database, linear(), CPU, SPACE, failed=[f"{number}-{n}"])

    open_database(url).close()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(notes, range(4)))
    with open_database(url) as database:
        assert len(search_of(database, linear(), CPU, SPACE).failed) == 80
