"""100,000 records: importing them and looking one up."""

from __future__ import annotations

import random
import statistics
import time

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


@pytest.mark.slow
@pytest.mark.timed
def test_scale(bundle, url):
    with open_database(url) as database:
        start = time.perf_counter()
        assert import_bundle(database, bundle) == (RECORDS, RECORDS)
        seconds = time.perf_counter() - start
        assert sum(count(database).values()) == RECORDS
    with open_database(url, writable=False) as database:
        rng = random.Random(SEED)
        shapes = [linear(64 * rng.randrange(1, WORKLOADS + 1), 4096) for _ in range(200)]
        times = []
        for shape in shapes:
            start = time.perf_counter()
            assert lookup(database, shape, H200) is not None
            times.append(time.perf_counter() - start)
        assert lookup(database, linear(7, 7), H200) is None  # nothing is there: nothing is found
    median, worst = statistics.median(times) * 1e3, max(times) * 1e3
    undisturbed = statistics.quantiles(times, n=10)[0] * 1e3  # other work on the machine only ever adds
    print(f"import {seconds:.1f} s; lookup {undisturbed:.2f}, median {median:.2f}, worst {worst:.2f} ms, seed {SEED}")
    assert seconds < IMPORT_SECONDS
    assert undisturbed < LOOKUP_MS
