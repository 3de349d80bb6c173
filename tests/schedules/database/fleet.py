"""A worker for the tests: `python -m tests.schedules.database.fleet URL NAME SEED cpu|cuda [jump]`; kernels are fakes.

Its task is a number; it gives the number's square, and a record that names task and worker.
"""

from __future__ import annotations

import random
import sys
import time
from threading import Event

from vllm_compile.schedules.database import open_database
from vllm_compile.schedules.database.executors import Executor, Outcome, TaskFailedError
from vllm_compile.schedules.database.worker import Worker

from .samples import CPU, H200, record

KIND = "square"
LEASE_SECONDS = 2.0
MACHINES = {"cpu": CPU, "cuda": H200}


class FakeKernels(Executor):
    def __init__(self, name: str, seed: str) -> None:
        self._name, self._random = name, random.Random(seed)

    def run(self, held, lost: Event) -> Outcome:
        time.sleep(self._random.uniform(0, 0.01))
        if self._random.random() < 0.01:
            raise TaskFailedError("a made-up failure")
        if self._random.random() < 0.002:
            time.sleep(1.5 * LEASE_SECONDS)  # renewed meanwhile
        return Outcome(held.payload**2, [record(config={"task": held.payload}, host=self._name)])

    def close(self) -> None:
        pass


def main(url: str, name: str, seed: str, machine: str, jump: str = "") -> None:
    if jump:
        clock, jumps = time.time, random.Random(seed)
        time.time = lambda: clock() + jumps.choice((-1e6, 0, 1e6))
    with open_database(url) as database:
        about = {"poll_seconds": 0.1, "machines": [MACHINES[machine]]}
        Worker(database, FakeKernels(name, seed), [KIND], name, LEASE_SECONDS, **about).run(Event())


if __name__ == "__main__":
    main(*sys.argv[1:])
