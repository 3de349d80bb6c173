"""Tasks on a Ray cluster: each place that can measure undisturbed, a GPU or a node without one, does one at a time.

Ray starts and ends the processes, over the nodes that it knows; the queue, its leases and the records stay in the
database.  https://docs.ray.io
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    LocalRayletDiedError,
    OutOfMemoryError,
    RayError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vllm_compile.errors import DatabaseError

from .executors import POLL_SECONDS, Executor, Handler, Outcome, TaskCrashedError, TaskFailedError, attempt, outcome_of
from .fingerprint import Fingerprint
from .gpu import is_ambiguous
from .machine import machines_here
from .tasks import Lease


@dataclass(frozen=True)
class Place:
    """Where one task runs at a time: a node of the cluster, and whether the task gets one of its GPUs."""

    node: str
    host: str
    gpu: bool


def connect(address: str = "auto") -> Sequence[Place]:
    """Join the Ray cluster at `address` ("auto": the one that this machine is a node of); its places.

    Raises:
        DatabaseError: there is no cluster there.
    """
    try:
        if address != "auto":  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RayError, ValueError) as error:
        raise DatabaseError(
            f"no Ray cluster at {address!r} ({error}); start one with `ray start --head`, then `ray start "
            "--address=HOST:6379` on the other nodes"
        ) from error
    places = []
    for node in ray.nodes():
        if node["Alive"]:
            gpus = int(node["Resources"].get("GPU", 0))
            places += [Place(node["NodeID"], node["NodeManagerHostname"], gpus > 0)] * max(gpus, 1)
    return places


class RayExecutor(Executor):
    """Runs tasks at one place of the cluster that `connect` joined; a crash or a hang is a failed attempt.

    Args:
        handlers: by kind of task; functions of modules that the cluster's nodes have too.
        timeout: seconds that an attempt may take, the start of a process for it included.
    """

    def __init__(self, handlers: Mapping[str, Handler], timeout: float, place: Place) -> None:
        self._handlers = dict(handlers)
        self._timeout = timeout
        where = NodeAffinitySchedulingStrategy(place.node, soft=False)
        there = {"num_cpus": 0, "num_gpus": int(place.gpu), "max_retries": 0, "scheduling_strategy": where}
        self._place = place
        self._attempt = ray.remote(attempt).options(**there)
        self._machines = ray.remote(machines_here).options(**there)
        self._is_ambiguous = ray.remote(is_ambiguous).options(**there)

    def machines(self) -> Sequence[Fingerprint]:
        """The place's GPU, or the CPU of a node without one: where several tasks run side by side, none is measured
        on the CPU.

        Raises:
            DatabaseError: the node does not tell.
        """
        found = self._told(self._machines)
        return [machine for machine in found if (machine.kind == "cpu") != self._place.gpu]

    def is_ambiguous(self) -> bool:
        """As for `machines`; a node without a GPU is not asked."""
        return self._place.gpu and self._told(self._is_ambiguous)

    def run(self, held: Lease, lost: Event) -> Outcome:
        running = self._attempt.remote(self._handlers[held.kind], held.payload)
        deadline = time.monotonic() + self._timeout
        try:
            while True:
                if lost.is_set():
                    raise TaskFailedError("the lease was lost while it ran")
                if time.monotonic() > deadline:
                    raise TaskCrashedError(f"took longer than {self._timeout:g} s")
                try:
                    succeeded, text = ray.get(running, timeout=POLL_SECONDS)
                    break
                except GetTimeoutError:
                    continue
        except (WorkerCrashedError, OutOfMemoryError, LocalRayletDiedError) as ended:
            raise TaskCrashedError(f"its process ended: {_first_line(ended)}") from ended
        except RayError as failed:
            raise TaskFailedError(f"Ray could not run it: {_first_line(failed)}") from failed
        except TaskFailedError:
            self._end(running)
            raise
        return outcome_of(succeeded, text)

    def close(self) -> None:
        """Nothing is held between tasks."""

    def _told(self, function: Any) -> Any:
        """What a function says at the place."""
        try:
            return ray.get(function.remote(), timeout=self._timeout)
        except RayError as error:
            raise DatabaseError(f"the Ray node {self._place.host} cannot be used: {_first_line(error)}") from error

    def _end(self, running: ray.ObjectRef) -> None:
        """End a task with its process, and wait until it has: the next one is to have the place for itself."""
        ray.cancel(running, force=True)
        try:
            ray.get(running, timeout=10)
        except (TaskCancelledError, RayError):
            return


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
