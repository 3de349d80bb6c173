"""The command line of tuning: `vllm-compile tune`."""

from __future__ import annotations

import argparse
import json
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .cli_database import opened
from .errors import DatabaseError, TargetError, VllmCompileError

if TYPE_CHECKING:
    from .schedules.database import Database
    from .schedules.database.executors import Executor
    from .schedules.tuning.search import Progress
    from .schedules.tuning.task import Range, Task
    from .targets import Target

console = Console(stderr=True)
UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
NAME_WIDTH = 12  # of the table's first column at least, on a narrow terminal
TASK_SECONDS = 1800  # after which a task is taken for hung
TRIAL_SECONDS = 120  # after which a few candidates are


def add_tune(commands: Any) -> None:
    """Add `tune`."""
    parser = commands.add_parser("tune", help="find the fastest configurations of a model's kernels")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face directory, or artifact")
    parser.add_argument(
        "--target", default="cpu", help="cpu: measured here (default); rocm, gfx90a, gfx950: estimated, by a model"
    )
    parser.add_argument("--db", metavar="URL", help="the tuning database, where records go")
    parser.add_argument(
        "--trials", type=positive, default=64, metavar="N", help="configurations of a range of tokens at most"
    )
    parser.add_argument(
        "--traces",
        type=positive,
        default=0,
        metavar="N",
        help="schedules of TIR that MetaSchedule may try, too, for each number of tokens (cpu, --pack none)",
    )
    parser.add_argument("--budget", type=seconds_of, default=float("inf"), metavar="10m", help="time to spend")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="NAMES", help="weights' names")
    parser.add_argument("--pack", choices=("lossless", "none"), default="lossless", help="weights, as for compile")
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
    import torch

    from .bandwidth import read_bandwidth
    from .driver import lower_model
    from .schedules.tuning.search import Progress
    from .schedules.tuning.task import ESTIMATE, METHODS, tasks_of
    from .targets import resolve

    target = resolve(options.target)
    if target.name not in METHODS:
        raise TargetError("tune searches for cpu and rocm; benchmarks/search_cuda_linear.py does for cuda")
    estimated = METHODS[target.name] == ESTIMATE
    if estimated and (options.submit or options.traces):
        raise TargetError("estimates need no machine of their own and are of listed spaces: no --submit, no --traces")
    if options.traces and options.submit:
        raise TargetError("MetaSchedule searches here; workers take listed spaces alone: no --submit with --traces")
    if options.db is None and not options.dry_run:
        raise DatabaseError("--db URL is needed: the records have to go somewhere (a file will do, tuning.db)")
    with tempfile.TemporaryDirectory() as scratch:
        console.print("reading the model", highlight=False)
        plain, lossless = _plain_model(options.model, Path(scratch)), options.pack == "lossless"
        lowered = lower_model(plain, target, options.dtype, lossless)
    tasks = _chosen(tasks_of(lowered, target, options.trials, options.traces), options.only)
    if options.traces:
        _check_traces(tasks)
    bandwidth = float("inf") if estimated else read_bandwidth(torch.device("cpu"))
    if options.db is None:
        work: Sequence[Progress] = [Progress(task) for task in tasks]
        _say_how_long(work, bandwidth)
    else:
        with opened(options, writable=not options.dry_run) as database:
            work = _searched(database, tasks, target, bandwidth, options)
    if options.dry_run:
        console.print(_table(work))
    return _answer(options, work)


def _searched(
    database: Database, tasks: Sequence[Task], target: Target, bandwidth: float, options: argparse.Namespace
) -> Sequence[Progress]:
    """What became of the tasks; Ctrl-C ends the search after the one under way, a second one at once."""
    from .schedules.database.machine import fingerprint
    from .schedules.database.record import How
    from .schedules.tuning.search import pending, submit, time_left, tune
    from .schedules.tuning.task import ESTIMATE, METHODS

    machine, method = fingerprint(target), METHODS[target.name]

    def searched(task: Task, wanted: Range) -> bool:
        from .schedules.tuning.evolve import is_searched

        return is_searched(task, wanted, database, machine)

    work = pending(database, tasks, machine, tuple(How) if method == ESTIMATE else (How.MEASURED,), searched)
    _say_how_long(work, bandwidth)
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
    executor, trials, began = _executor(method), _trials(), time.monotonic()

    def widen(task: Task, over: Callable[[], bool]) -> Task:
        if not any(wanted.traces for wanted in task.ranges):
            return task
        from .schedules.tuning.evolve import evolved

        return evolved(task, database, trials, over)

    def table() -> Table:
        return _table(work, time_left(work, bandwidth, time.monotonic() - began))

    try:
        with Live(table(), console=console, auto_refresh=False) as live:
            tune(database, work, executor, stop, options.budget, lambda _: live.update(table(), refresh=True), widen)
    finally:
        executor.close()
        trials.close()
        signal.signal(signal.SIGINT, before)
    return work


def _executor(method: str) -> Executor:
    """A process for this kind of tasks alone: where kernels are timed there must be no TVM, which estimates need."""
    from .schedules.database.executors import LocalExecutor
    from .schedules.tuning.task import ESTIMATE

    if method == ESTIMATE:
        from .schedules.tuning.estimate import estimate

        return LocalExecutor({method: estimate}, TASK_SECONDS)
    from .schedules.tuning.measure import measure

    return LocalExecutor({method: measure}, TASK_SECONDS)


def _trials() -> Executor:
    """A process for the candidates of a search by MetaSchedule."""
    from .schedules.database.executors import LocalExecutor
    from .schedules.tuning.measure import TRIAL, trial

    return LocalExecutor({TRIAL: trial}, TRIAL_SECONDS)


def _check_traces(tasks: Sequence[Task]) -> None:
    """Raise an error unless MetaSchedule has something to search, and what it needs."""
    if not any(wanted.traces for task in tasks for wanted in task.ranges):
        raise VllmCompileError(
            "--traces: no call here has a kernel in TIR to search; on cpu linear layers have, with --pack none"
        )
    if find_spec("xgboost") is None:
        raise VllmCompileError("--traces needs xgboost for its cost model; pip install 'vllm-compile[tune]'")


def _say_how_long(work: Sequence[Progress], bandwidth: float) -> None:
    from .schedules.tuning.search import time_left

    left = time_left(work, bandwidth, spent=0.0)
    verbs = " or ".join(sorted({progress.task.method for progress in work}))
    console.print(f"about {left / 60:.0f} minutes to {verbs} what is not known yet", highlight=False)


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


def _table(work: Sequence[Progress], left: float | None = None) -> Table:
    """What is known of each task, and how many seconds are left; µs and rates are of the fewest tokens."""
    table = Table(
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,
        caption=None if left is None else f"about {left / 60:.1f} minutes left",
    )
    table.add_column("weight", overflow="fold", min_width=NAME_WIDTH)
    for title in ("calls", "", "tried", "wrong", "failed", "µs", "GB/s", "roofline", "gain"):
        table.add_column(title)
    for progress in work:
        task = progress.task
        best = (f"{progress.best_us:.1f}", f"{progress.gb_per_s:.0f}", f"{progress.roofline_share:.0%}")
        table.add_row(
            ", ".join(task.names),
            str(task.calls),
            progress.state,
            f"{progress.tried}/{sum(len(r.configs) for r in task.ranges)}",
            *(str(count) if count else "" for count in (progress.wrong, progress.failed)),
            *((*best, f"{progress.gain():.2f}x") if progress.state == "done" else ()),
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
                "best_us": progress.best_us,
                "gb_per_s": progress.gb_per_s,
                "roofline_share": progress.roofline_share,
            }
            for progress in work
        ]
        print(json.dumps({"tasks": summary}))
    for progress in failed:
        names = ", ".join(progress.task.names)
        console.print(f"[red]failed:[/red] {names}: {progress.reason}", highlight=False)
    return 1 if failed else 0
