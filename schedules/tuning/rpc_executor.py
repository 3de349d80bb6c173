"""Tasks measured on boards that cannot run Python, over TVM's RPC: candidates are built here, uploaded, timed there.

A board runs TVM's server (C++ or Python) and is registered with a tracker under a key; the tracker lends them, one task
at a time.  RPC is plain text without passwords: whoever reaches a port runs what he likes.  So only where asked for.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
import tvm
from tvm import rpc
from tvm.error import InternalError, RPCSessionTimeoutError

from vllm_compile.targets import resolve

from ..database.executors import POLL_SECONDS, Executor, Outcome, TaskCrashedError, TaskFailedError
from ..database.fingerprint import Fingerprint
from ..database.machine import fingerprint
from ..database.tasks import Lease
from .device import Call, Cpu, Kernel
from .measure import COLD_BYTES, build, measure_on
from .task import MEASURE

# A server that a candidate ended is started again by whoever minds the board; tasks taken meanwhile must not fail.
PATIENCE_SECONDS = 20.0

WARNING = (
    "TVM's RPC is neither encrypted nor authenticated: whoever reaches the tracker or a board runs code there, and can "
    "make up results; use it within a network of your own"
)


@dataclass(frozen=True)
class BoardKernel:
    """A kernel of a library on a board."""

    module: Any
    symbol: str
    device: Any

    def __call__(self, *tensors: Any) -> None:
        self.module[self.symbol](*tensors)

    def seconds(self, *tensors: Any) -> float:
        """Of one call, by the board's own clock, weights not in its caches."""
        timed = self.module.time_evaluator(self.symbol, self.device, number=1, cache_flush_bytes=COLD_BYTES)
        return timed(*tensors).mean


class Board(Cpu):
    """A board's CPU: of the instruction sets that the candidates are built for.

    Args:
        session: with the board's server.
        name: the board's key; records call the device so.
        gb_per_s: what its memory can do.
    """

    def __init__(self, session: Any, name: str, gb_per_s: float) -> None:
        self._session, self._name, self._gb_per_s = session, name, gb_per_s
        self._uploaded: dict[tuple[int, torch.Size], Any] = {}

    @property
    def name(self) -> str:
        return self._name

    def load(self, library: Path) -> Callable[[str], Kernel]:
        self._session.upload(str(library))
        module = self._session.load_module(library.name)
        return lambda symbol: BoardKernel(module, symbol, self._session.cpu(0))

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory: the board's caches are flushed between calls."""
        return tensor

    def argument(self, tensor: torch.Tensor) -> Any:
        """Uploaded once: inputs do not change."""
        key = tensor.data_ptr(), tensor.shape
        if key not in self._uploaded:
            self._uploaded[key] = self.output(tensor)
        return self._uploaded[key]

    def output(self, tensor: torch.Tensor) -> Any:
        here, there = _empty(tensor), _empty(tensor, self._session.cpu(0))
        torch.from_dlpack(here).copy_(tensor)
        here.copyto(there)
        return there

    def read(self, output: Any, tensor: torch.Tensor) -> None:
        here = _empty(tensor)
        output.copyto(here)
        tensor.copy_(torch.from_dlpack(here))

    def timer(self, calls: Sequence[Call]) -> Callable[[int], float]:
        (call, *_) = calls
        kernel = call.func
        assert isinstance(kernel, BoardKernel), kernel
        return lambda turn: kernel.seconds(*call.args) * 1e6

    def bandwidth(self) -> float:
        return self._gb_per_s * 1e9


def _boards(tracker: rpc.TrackerSession) -> set[str]:
    return {server["key"].removeprefix("server:") for server in tracker.summary()["server_info"]}


def _empty(like: torch.Tensor, device: Any = None) -> Any:
    """TVM's memory for such a tensor: aligned as TVM wants it, which torch's need not be."""
    return tvm.runtime.empty(tuple(like.shape), str(like.dtype).removeprefix("torch."), device or tvm.cpu(0))


@dataclass(frozen=True)
class RpcExecutor(Executor):
    """Measures each task on a board that the tracker gives for `key`; what ends the board's server is a crash.

    Attributes:
        host, port: the tracker.
        gb_per_s: what a board's memory can do.
        timeout: seconds that a board may take for a task.
    """

    host: str
    port: int
    key: str
    gb_per_s: float
    timeout: float

    def machines(self) -> Sequence[Fingerprint]:
        """A board, which runs what this CPU would."""
        return [fingerprint(resolve("cpu"), self.key)]

    def run(self, held: Lease, lost: Event) -> Outcome:
        if held.kind != MEASURE:
            raise TaskFailedError(f"boards take tasks of kind {MEASURE}, not {held.kind}")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            try:
                # TVM itself would try for a minute.
                socket.create_connection((self.host, self.port), timeout=10).close()
                tracker = rpc.connect_tracker(self.host, self.port)
                self._await_board(tracker, lost)
                build(held.payload | {"board": self.key}, folder)
                self._await_board(tracker, lost)  # which took minutes: the board may have gone
                session = tracker.request(self.key, session_timeout=self.timeout, max_retry=1)
                board = Board(session, self.key, self.gb_per_s)
                return measure_on(board, held.payload, folder)
            except (InternalError, RPCSessionTimeoutError) as error:  # TVM's words for a server that is gone, or slow
                raise TaskCrashedError(f"the board {self.key} answers no more: {error}") from error
            except (RuntimeError, OSError, AttributeError, TypeError, KeyError) as error:
                raise TaskFailedError(str(error)) from error

    def _await_board(self, tracker: rpc.TrackerSession, lost: Event) -> None:
        """Asking the tracker for a key that nobody has would wait for ever."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.key not in (boards := _boards(tracker)):
            if lost.wait(POLL_SECONDS):
                raise TaskFailedError("the lease was lost while it waited for a board")
            if time.monotonic() > deadline:
                there = ", ".join(sorted(boards)) or "none"
                raise TaskFailedError(f"the tracker has no board {self.key}; there are: {there}")

    def close(self) -> None:
        """A session ends with its task."""
