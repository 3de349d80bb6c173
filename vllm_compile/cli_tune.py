"""The command line of tuning: `vllm-compile tune`."""

from __future__ import annotations

import argparse
import json
import re
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .cli_database import opened
from .errors import DatabaseError, TargetError, VllmCompileError

if TYPE_CHECKING:
    from .schedules.database import Database
    from .schedules.tuning.search import Progress
    from .schedules.tuning.task import Task
    from .targets import Target

console = Console(stderr=True)
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
TASK_SECONDS = 1800  # after which a task is taken for hung


def add_tune(commands: Any) -> None:
    """Add `tune`."""
    parser = commands.add_parser("tune", help="find the fastest configurations of a model's kernels on this machine")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory, or artifact")
    parser.add_argument("--target", default="cpu", help="what to tune for (default: cpu)")
    parser.add_argument("--db", metavar="URL", help="the tuning database, where records go")
    parser.add_argument(
        "--trials", type=positive, default=64, metavar="N", help="configurations of a range of tokens at most"
    )
    parser.add_argument("--budget", type=seconds_of, default=float("inf"), metavar="10m", help="time to spend")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="NAMES", help="weights' names")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the model's own")
    parser.add_argument("--dry-run", action="store_true", help="say what there is to tune, and how long it will take")
    parser.add_argument("--submit", action="store_true", help="leave the tasks to workers (vllm-compile worker)")
    parser.add_argument("--json", action="store_true", help="a summary as the last line of stdout")
    parser.set_defaults(run=_tune)


def positive(text: str) -> int:
    """A whole number from 1 on; ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def seconds_of(text: str) -> float:
    """`90`, `90s`, `10m` or `2h` in seconds; ArgumentTypeError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 10m or 2h")
    return float(found[1]) * UNITS[found[2]]


def _tune(options: argparse.Namespace) -> int:
    from .driver import lower_model
    from .schedules.tuning.search import Progress
    from .schedules.tuning.task import tasks_of
    from .targets import resolve

    target = resolve(options.target)
    if target.name != "cpu":
        raise TargetError("tune searches for cpu; benchmarks/search_cuda_linear.py does for cuda")
    if options.db is None and not options.dry_run:
        raise DatabaseError("--db URL is needed: the records have to go somewhere (a file will do, tuning.db)")
    with tempfile.TemporaryDirectory() as scratch:
        console.print("reading the model", highlight=False)
        lowered = lower_model(_plain_model(options.model, Path(scratch)), target, options.dtype)
    tasks = _chosen(tasks_of(lowered, target, options.trials), options.only)
    if options.db is None:
        work: Sequence[Progress] = [Progress(task) for task in tasks]
        _say_how_long(work)
    else:
        with opened(options, writable=not options.dry_run) as database:
            work = _searched(database, tasks, target, options)
    if options.dry_run:
        console.print(_table(work))
    return _answer(options, work)


def _searched(
    database: Database, tasks: Sequence[Task], target: Target, options: argparse.Namespace
) -> Sequence[Progress]:
    """What became of the tasks; Ctrl-C ends the search after the one under way, a second one at once."""
    from .schedules.database.executors import LocalExecutor
    from .schedules.database.machine import fingerprint
    from .schedules.tuning.measure import measure
    from .schedules.tuning.search import KIND, pending, submit, tune

    machine = fingerprint(target)
    work = pending(database, tasks, machine)
    _say_how_long(work)
    if options.dry_run:
        return work
    if options.submit:
        console.print(f"{submit(database, work, machine)} new tasks in the queue", highlight=False)
        return work
    stop, before = Event(), signal.getsignal(signal.SIGINT)

    def end(*_: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)  # a second Ctrl-C does not wait

    signal.signal(signal.SIGINT, end)
    executor = LocalExecutor({KIND: measure}, TASK_SECONDS)
    try:
        with Live(_table(work), console=console, auto_refresh=False) as live:
            tune(database, work, executor, stop, options.budget, lambda _: live.update(_table(work), refresh=True))
    finally:
        executor.close()
        signal.signal(signal.SIGINT, before)
    return work


def _say_how_long(work: Sequence[Progress]) -> None:
    import torch

    from .bandwidth import read_bandwidth
    from .schedules.tuning.search import estimate

    left = estimate([p.task for p in work if p.state == "waiting"], read_bandwidth(torch.device("cpu")))
    console.print(f"about {left / 60:.0f} minutes to measure what is not known yet", highlight=False)


def _plain_model(model: Path, scratch: Path) -> Path:
    """The directory itself, or of an artifact the configuration that it was compiled from."""
    from .artifact import write_plain_config
    from .runtime.manifest import MANIFEST

    if not (model / MANIFEST).exists():
        return model
    write_plain_config(model, scratch)
    return scratch


def _chosen(tasks: Sequence[Task], only: Sequence[str]) -> list[Task]:
    """Those with a weight whose name contains one of `only`; all if it names none."""
    chosen = [task for task in tasks if not only or any(part in name for part in only for name in task.names)]
    if not chosen:
        names = ", ".join(name for task in tasks for name in task.names)
        raise VllmCompileError(f"--only names no weight that can be tuned; there are {names or 'none'}")
    return chosen


def _table(work: Sequence[Progress]) -> Table:
    table = Table()
    for title in ("weight", "calls", "ranges", "candidates", "", "tried", "wrong", "failed", "GB/s", "gain"):
        table.add_column(title, overflow="fold")
    for progress in work:
        task = progress.task
        counts = (progress.tried, progress.wrong, progress.failed)
        done = progress.state == "done"
        table.add_row(
            ", ".join(task.names),
            str(task.calls),
            str(len(task.ranges)),
            str(sum(len(r.configs) for r in task.ranges)),
            progress.state,
            *(str(count) if count else "" for count in counts),
            f"{progress.gb_per_s:.1f}" if done else "",
            f"{progress.gain():.2f}x" if done else "",
        )
    return table


def _answer(options: argparse.Namespace, work: Sequence[Progress]) -> int:
    failed = [progress for progress in work if progress.state == "failed"]
    if options.json:
        summary = [
            {
                "weights": progress.task.names,
                "state": progress.state,
                "candidates": sum(len(r.configs) for r in progress.task.ranges),
                "tried": progress.tried,
                "wrong": progress.wrong,
                "failed": progress.failed,
                "reason": progress.reason,
                "speedups": progress.speedups,
            }
            for progress in work
        ]
        print(json.dumps({"tasks": summary}))
    for progress in failed:
        names = ", ".join(progress.task.names)
        console.print(f"[red]failed:[/red] {names}: {progress.reason}", highlight=False)
    return 1 if failed else 0
