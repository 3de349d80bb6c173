"""The command line of workers: `vllm-compile worker`; see docs/tuning-database.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from threading import Event
from typing import TYPE_CHECKING, Any

from .cli_database import console, opened
from .errors import DatabaseError

if TYPE_CHECKING:
    from .schedules.database.executors import Executor, Handler

TASK_KINDS = "vllm_compile.task_kinds"  # entry points: name of a kind of task -> function that does it
ONLY_FREE = "nothing but tasks for no machine in particular"
AMBIGUOUS = (
    "its machine has different GPUs, and which is CUDA's first cannot be told: no tasks for GPUs are taken; set "
    "CUDA_DEVICE_ORDER=PCI_BUS_ID, or CUDA_VISIBLE_DEVICES to a UUID"
)
BOARDS_DO = "measure"  # the kind of tasks that boards without Python can do


def address(text: str) -> tuple[str, int]:
    """`HOST:PORT`; ArgumentTypeError for anything else."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no HOST:PORT")
    return host, int(port)


def positive(text: str) -> float:
    """A number above zero; ArgumentTypeError for anything else."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above zero")
    return number


def add_worker(commands: Any) -> None:
    """Add `worker`."""
    parser = commands.add_parser("worker", help="take tasks from a database's queue and do them")
    parser.add_argument("--db", required=True, metavar="URL", help="where the queue is")
    parser.add_argument(
        "--executor",
        choices=("local", "ray", "tvm-rpc"),
        default="local",
        help="where tasks run: here, all over a Ray cluster, or on boards without Python",
    )
    parser.add_argument("--ray-address", default="auto", metavar="HOST:PORT", help="default: this machine's cluster")
    parser.add_argument("--tracker", type=address, metavar="HOST:PORT", help="TVM's RPC tracker (tvm-rpc)")
    parser.add_argument("--board", metavar="KEY", help="boards' key at the tracker; records name it (tvm-rpc)")
    parser.add_argument("--gb-per-s", type=positive, metavar="GB/S", help="what a board's memory can do (tvm-rpc)")
    parser.add_argument("--until-empty", action="store_true", help="stop when there is no task left to take")
    parser.add_argument(
        "--lease", type=float, default=60.0, metavar="SECONDS", help="of silence, then another takes over"
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for one attempt at a task")
    parser.add_argument("--json", action="store_true", help="counts as the last line of stdout")
    parser.set_defaults(run=_worker)


def _worker(options: argparse.Namespace) -> int:
    with opened(options, writable=True) as database:
        from .schedules.database.worker import Worker, default_name, work

        handlers = {entry.name: entry.load() for entry in entry_points(group=TASK_KINDS)}
        if options.executor == "tvm-rpc":
            handlers = {name: handler for name, handler in handlers.items() if name == BOARDS_DO}
        if not handlers:
            raise DatabaseError(f"no kind of task is installed here that a worker could do (entry points {TASK_KINDS})")
        stop = Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        executors = _executors(options, handlers)
        try:
            workers = [
                Worker(database, e, sorted(handlers), default_name(), options.lease, machines=e.machines())
                for e in executors
            ]
            for worker, executor in zip(workers, executors, strict=True):
                where = ", ".join(machine.summary() for machine in worker.machines) or ONLY_FREE
                kinds = ", ".join(worker.kinds)
                console.print(
                    f"worker {worker.name} takes tasks: {kinds}; for {where}", soft_wrap=True, highlight=False
                )
                if executor.is_ambiguous():
                    console.print(f"[yellow]warning:[/yellow] {AMBIGUOUS}", soft_wrap=True, highlight=False)
            done = work(workers, stop, options.until_empty, lambda line: console.print(line, highlight=False))
        finally:
            for executor in executors:
                executor.close()
    console.print(f"{done.completed} done, {done.failed} failed attempts, {done.lost} lost")
    if options.json:
        print(json.dumps(dataclasses.asdict(done)))
    return 0


def _executors(options: argparse.Namespace, handlers: Mapping[str, Handler]) -> Sequence[Executor]:
    """One for each place where a task can run."""
    if options.executor == "local":
        from .schedules.database.executors import LocalExecutor

        return [LocalExecutor(handlers, options.timeout)]
    if options.executor == "tvm-rpc":
        return [_rpc_executor(options)]
    try:
        from .schedules.database.ray_executor import RayExecutor, connect
    except ModuleNotFoundError as error:
        raise DatabaseError(f"--executor ray needs {error.name}; pip install 'vllm-compile[ray]'") from error
    return [RayExecutor(handlers, options.timeout, place) for place in connect(options.ray_address)]


def _rpc_executor(options: argparse.Namespace) -> Executor:
    """The boards behind a tracker; what that means for safety is said."""
    missing = [name for name in ("tracker", "board", "gb_per_s") if getattr(options, name) is None]
    if missing:
        raise DatabaseError(f"--executor tvm-rpc needs {', '.join('--' + name.replace('_', '-') for name in missing)}")
    try:
        from .schedules.tuning.rpc_executor import WARNING, RpcExecutor
    except ModuleNotFoundError as error:
        raise DatabaseError(f"--executor tvm-rpc needs {error.name}; pip install 'vllm-compile[compile]'") from error
    console.print(f"[yellow]warning:[/yellow] {WARNING}", highlight=False)
    host, port = options.tracker
    return RpcExecutor(host, port, options.board, options.gb_per_s, options.timeout)
