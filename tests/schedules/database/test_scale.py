"""100,000 records: importing them and looking one up.

In seconds of a processor, which others on the machine do not take; seconds of the clock are printed.
"""

from __future__ import annotations

import random
import statistics
import time

import psutil
import pytest

from tests.conftest import SEED
from vllm_compile.schedules.database import State, lookup, open_database
from vllm_compile.schedules.database.bundle import import_bundle, write_bundle
from vllm_compile.schedules.database.store import count

from .samples import H200, linear, random_records

RECORDS, WORKLOADS = 100_000, 200
IMPORT_SECONDS, LOOKUP_MS = 60, 5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("scale") / "a.bundle"
    write_bundle(path, ((made, State.CANDIDATE) for made in random_records(SEED, RECORDS, WORKLOADS)))
    return path


def processor_seconds(database) -> float:
    """What this process has used so far, and the server's that answers it."""
    used = time.process_time()
    if not database.is_sqlite:
        with database.engine.connect() as connection:
            backend = psutil.Process(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one())
        used += backend.cpu_times().user + backend.cpu_times().system
    return used


@pytest.mark.slow
@pytest.mark.timed
def test_scale(bundle, url):
    with open_database(url) as database:
        start, before = time.perf_counter(), processor_seconds(database)
        assert import_bundle(database, bundle) == (RECORDS, RECORDS)
        import_seconds, elapsed = processor_seconds(database) - before, time.perf_counter() - start
        assert sum(count(database).values()) == RECORDS
    with open_database(url, writable=False) as database:
        rng = random.Random(SEED)
        shapes = [linear(64 * rng.randrange(1, WORKLOADS + 1), 4096) for _ in range(200)]
        times, before = [], processor_seconds(database)
        for shape in shapes:
            start = time.perf_counter()
            assert lookup(database, shape, H200) is not None
            times.append(time.perf_counter() - start)
        lookup_ms = (processor_seconds(database) - before) / len(shapes) * 1e3
        assert lookup(database, linear(7, 7), H200) is None  # nothing is there: nothing is found
    median, worst = statistics.median(times) * 1e3, max(times) * 1e3
    print(f"import {import_seconds:.1f} s, {elapsed:.1f} by the clock; seed {SEED}")
    print(f"lookup {lookup_ms:.2f} ms, by the clock median {median:.2f}, worst {worst:.2f}")
    assert import_seconds < IMPORT_SECONDS
    assert lookup_ms < LOOKUP_MS
