"""A worker: takes tasks from the queue and has them done, until it is stopped."""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

from vllm_compile.errors import DatabaseError, LeaseLostError, UnreachableError

from .executors import Executor, TaskFailedError
from .fingerprint import Fingerprint
from .home import Database
from .tasks import Lease, complete, give_up, lease, renew

MOST_SECONDS_BETWEEN_RETRIES = 5.0


@dataclass
class Done:
    """What a worker did: attempts that gave a result, failed, or whose lease was lost."""

    completed: int = 0
    failed: int = 0
    lost: int = 0


@dataclass(frozen=True)
class Worker:
    """Attributes:
    kinds: of tasks that the executor can do.
    machines: whose tasks it can do, beside those for no machine in particular.
    lease_seconds: how long after a worker's death its task waits; renewed three times in that time.
    poll_seconds: between looks at an empty queue.
    patience_seconds: how long to try a database that does not answer.
    """

    database: Database
    executor: Executor
    kinds: Sequence[str]
    name: str
    lease_seconds: float = 60.0
    poll_seconds: float = 1.0
    patience_seconds: float = 600.0
    machines: Sequence[Fingerprint] = ()

    def run(self, stop: Event, until_empty: bool = False, report: Callable[[str], None] = lambda line: None) -> Done:
        """Do tasks until `stop` is set, or with `until_empty` until there is none to take.

        Raises:
            UnreachableError: the database did not answer for `patience_seconds`.
            DatabaseError: it refuses.
        """
        done = Done()
        while not stop.is_set():
            held = self._patiently(self._lease)
            if held is not None:
                self._do(held, done, report)
            elif until_empty:
                break
            else:
                stop.wait(self.poll_seconds)
        return done

    def _lease(self) -> Lease | None:
        return lease(self.database, self.name, self.kinds, self.lease_seconds, self.machines)

    def _do(self, held: Lease, done: Done, report: Callable[[str], None]) -> None:
        lost, ended = Event(), Event()
        heartbeat = Thread(target=self._beat, args=(held, lost, ended), daemon=True)
        heartbeat.start()
        try:
            reason = self._attempt(held, lost)
            if reason is None:
                done.completed += 1
                report(f"task {held.task} ({held.kind}) done")
            else:
                done.failed += 1
                report(f"task {held.task} ({held.kind}) failed at attempt {held.attempt}: {reason}")
        except LeaseLostError as error:
            done.lost += 1
            report(str(error))
        finally:
            ended.set()
            heartbeat.join()

    def _attempt(self, held: Lease, lost: Event) -> str | None:
        """Do the task and store what comes of it: its outcome, or the reason, which is returned, why there is none."""
        try:
            outcome = self.executor.run(held, lost)
            self._patiently(lambda: complete(self.database, held, outcome.result, outcome.records))
            return None
        except (LeaseLostError, UnreachableError):
            raise
        except (TaskFailedError, DatabaseError, ValueError) as error:  # also a record that may not be committed
            reason = str(error)
            self._patiently(lambda: give_up(self.database, held, reason))
            return reason

    def _beat(self, held: Lease, lost: Event, ended: Event) -> None:
        """Renew the lease until the task has ended; a database that does not answer may do so at the next beat."""
        while not ended.wait(self.lease_seconds / 3):
            try:
                renew(self.database, held, self.lease_seconds)
            except UnreachableError:
                continue
            except DatabaseError:
                if not ended.is_set():
                    lost.set()
                return

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Call again while the database does not answer, ever more seldom."""
        deadline, pause = time.monotonic() + self.patience_seconds, 0.1
        while True:
            try:
                return call()
            except UnreachableError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, MOST_SECONDS_BETWEEN_RETRIES)


def work(
    workers: Sequence[Worker],
    stop: Event,
    until_empty: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Done:
    """Run several workers side by side; if one of them cannot go on, all stop, and its error is raised."""
    with ThreadPoolExecutor(len(workers)) as pool:
        running = [pool.submit(worker.run, stop, until_empty, report) for worker in workers]
        for ended in as_completed(running):
            if ended.exception() is not None:
                stop.set()
    each = [future.result() for future in running]
    return Done(sum(d.completed for d in each), sum(d.failed for d in each), sum(d.lost for d in each))


def default_name() -> str:
    """`host:process:random`: no two workers have the same."""
    return f"{platform.node()}:{os.getpid()}:{secrets.token_hex(3)}"
