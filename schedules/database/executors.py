"""How a worker runs a task: an interface, and the way on this machine."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from threading import Event
from typing import Any, Protocol

from .fingerprint import Fingerprint
from .gpu import is_ambiguous
from .machine import machines_here
from .record import Record
from .tasks import Lease
from .workload import Workload

POLL_SECONDS = 0.05


class TaskFailedError(Exception):
    """An attempt came to nothing: an exception, a crash, a time-out; the message is stored with the task."""


class TaskCrashedError(TaskFailedError):
    """An attempt took its process along, or did not end in time."""


@dataclass(frozen=True)
class Outcome:
    """What a task gives: JSON of its own, and records."""

    result: Any = None
    records: Sequence[Record] = field(default=())

    def to_json(self) -> str:
        records = [[r.workload.text, r.target.text, r.content()] for r in self.records]
        return json.dumps({"result": self.result, "records": records})

    @staticmethod
    def from_json(text: str) -> Outcome:
        content = json.loads(text)
        records = [
            Record.from_content(record, Workload.from_text(workload), Fingerprint.from_text(target))
            for workload, target, record in content["records"]
        ]
        return Outcome(content["result"], records)


Handler = Callable[[Any], Outcome]  # of one kind of task: payload -> outcome


class Executor(Protocol):
    """Runs tasks, one at a time."""

    def machines(self) -> Sequence[Fingerprint]:
        """Those whose tasks it can do; tasks for no machine in particular it can do all."""
        return ()

    def is_ambiguous(self) -> bool:
        """True where there are GPUs, but which one is CUDA's first cannot be told: `machines` leaves them out."""
        return False

    def run(self, held: Lease, lost: Event) -> Outcome:
        """Do the task; stop early if `lost` is set, since nobody wants the outcome then.

        Raises:
            TaskFailedError: it came to nothing.
        """

    def close(self) -> None:
        """Give back processes and other resources."""


class LocalExecutor(Executor):
    """Runs tasks in a process of its own, so that a crash or a hang of a kernel is a failed attempt and no more.

    Args:
        handlers: by kind of task; functions that can be imported.
        timeout: seconds that an attempt may take.
    """

    def __init__(self, handlers: Mapping[str, Handler], timeout: float) -> None:
        self._handlers = dict(handlers)
        self._timeout = timeout
        self._process: Any = None
        self._pipe: Connection | None = None

    def machines(self) -> Sequence[Fingerprint]:
        return machines_here()

    def is_ambiguous(self) -> bool:
        return is_ambiguous()

    def run(self, held: Lease, lost: Event) -> Outcome:
        pipe = self._connected()
        deadline = time.monotonic() + self._timeout
        try:
            pipe.send_bytes(json.dumps([held.kind, held.payload]).encode())
            while not pipe.poll(POLL_SECONDS):
                if lost.is_set():
                    raise TaskFailedError("the lease was lost while it ran")
                if time.monotonic() > deadline:
                    raise TaskCrashedError(f"took longer than {self._timeout:g} s")
            succeeded, text = json.loads(pipe.recv_bytes())
        except (EOFError, OSError) as ended:
            self._process.join(1)
            code = self._process.exitcode
            self.close()
            raise TaskCrashedError(f"its process ended with exit code {code}") from ended
        except TaskFailedError:
            self.close()
            raise
        return outcome_of(succeeded, text)

    def close(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with what it started
            self._process.kill()
            self._process.join()
            assert self._pipe is not None
            self._pipe.close()
            self._process = self._pipe = None

    def _connected(self) -> Connection:
        if self._process is None or not self._process.is_alive():
            self.close()
            start = multiprocessing.get_context("spawn")  # a fork would share the parent's threads' locks, and CUDA
            self._pipe, theirs = start.Pipe()
            self._process = start.Process(target=_serve, args=(theirs, self._handlers), daemon=True)
            self._process.start()
            theirs.close()
        assert self._pipe is not None
        return self._pipe


def _serve(pipe: Connection, handlers: Mapping[str, Handler]) -> None:
    """The process: JSON of tasks in, JSON of outcomes out, until the worker is gone.

    It leads a session of its own: Ctrl-C at the terminal is for the worker to act on.
    """
    os.setsid()
    while True:
        try:
            kind, payload = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        pipe.send_bytes(json.dumps(attempt(handlers[kind], payload)).encode())


def outcome_of(succeeded: bool, text: str) -> Outcome:
    """The outcome that `attempt` gave, or TaskFailedError."""
    if not succeeded:
        raise TaskFailedError(text)
    return Outcome.from_json(text)


def attempt(handler: Handler, payload: Any) -> tuple[bool, str]:
    """Do a task: whether it succeeded, and its outcome as JSON or why it has none."""
    try:
        return True, handler(payload).to_json()
    except Exception as error:
        return False, "".join(traceback.format_exception_only(error)).strip()
