"""The command line of tuning: `vllm-compile tune`."""

from __future__ import annotations

import argparse
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table

from .cli_database import opened
from .cli_tune_table import answer, console, say_how_long, table
from .errors import DatabaseError, TargetError, VllmCompileError

if TYPE_CHECKING:
    from .schedules.database import Database, Fingerprint
    from .schedules.database.executors import Executor
    from .schedules.tuning.search import Progress
    from .schedules.tuning.task import Range, Task

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
TASK_SECONDS = 1800  # after which a task is taken for hung
TRIAL_SECONDS = 120  # after which a few candidates are


def add_tune(commands: Any) -> None:
    """Add `tune`."""
    parser = commands.add_parser("tune", help="find the fastest configurations of a model's kernels")
    parser.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face directory, or artifact")
    targets = "cpu (default), cuda, h100, h200: measured; rocm, gfx90a, gfx950: estimated, by a model"
    parser.add_argument("--target", default="cpu", help=targets)
    parser.add_argument("--build", type=Path, metavar="DIR", help="only build the candidates, to be measured elsewhere")
    parser.add_argument(
        "--measure", type=Path, metavar="DIR", help="measure what --build made; no --model, no TVM, no compiler needed"
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
    if options.measure is not None:
        return _measure_built(options)
    if options.model is None:
        raise VllmCompileError("--model DIR is needed (or --measure DIR, of what `tune --build DIR` made elsewhere)")
    import torch

    from .bandwidth import read_bandwidth
    from .driver import lower_model
    from .schedules.tuning.extract import METHODS, tasks_of
    from .schedules.tuning.search import Progress
    from .schedules.tuning.task import ESTIMATE
    from .targets import resolve

    target = resolve(options.target)
    if target.name not in METHODS:
        raise TargetError("tune searches for cpu, cuda and rocm; Gaudi's kernels have no configurations to choose from")
    method = METHODS[target.name]
    if method == ESTIMATE and (options.submit or options.traces or options.build):
        raise TargetError("estimates need no other machine, nor a search: leave out --submit, --traces and --build")
    if options.build is not None and target.name != "cuda":
        raise TargetError("--build is for --target cuda: a CPU is measured where its kernels are built")
    if options.traces and (options.submit or options.build):
        raise TargetError("MetaSchedule searches here; others take listed spaces alone: no --submit with --traces")
    elsewhere = options.dry_run or options.submit or options.build is not None
    if target.name == "cuda" and not elsewhere and not torch.cuda.is_available():
        raise TargetError(
            "there is no NVIDIA GPU here: --build DIR makes the candidates, which `vllm-compile tune --measure DIR "
            "--db URL` times on a machine that has one; or --submit leaves the tasks to workers"
        )
    if options.db is None and not options.dry_run and options.build is None:
        raise DatabaseError("--db URL is needed: the records have to go somewhere (a file will do, tuning.db)")
    with tempfile.TemporaryDirectory() as scratch:
        console.print("reading the model", highlight=False)
        plain, lossless = _plain_model(options.model, Path(scratch)), options.pack == "lossless"
        lowered = lower_model(plain, target, options.dtype, lossless)
    tasks = _chosen(tasks_of(lowered, target, options.trials, options.traces), options.only)
    if options.traces:
        _check_traces(tasks)
    if options.build is not None:
        return _build(options, tasks)
    bandwidth = float("inf") if target.name != "cpu" else read_bandwidth(torch.device("cpu"))
    if options.db is None:
        work: Sequence[Progress] = [Progress(task) for task in tasks]
        say_how_long(work, bandwidth)
    else:
        from .schedules.database.machine import fingerprint

        with opened(options, writable=not options.dry_run) as database:
            work = _searched(database, tasks, fingerprint(target), bandwidth, options)
    if options.dry_run:
        console.print(table(work))
    return answer(options, work)


def _build(options: argparse.Namespace, tasks: Sequence[Task]) -> int:
    """Candidates into a folder, to be measured elsewhere."""
    from .schedules.tuning.built import build
    from .schedules.tuning.search import Progress

    work = []
    for task in build(tasks, options.build):
        work.append(Progress(task, "built"))
        console.print(f"built {', '.join(task.names)}: {len(task.configs())} candidates", highlight=False)
    return answer(options, work)


def _measure_built(options: argparse.Namespace) -> int:
    """Measure what `--build` has made: without TVM."""
    from .schedules.tuning.built import built

    if options.db is None:
        raise DatabaseError("--db URL is needed: the records have to go somewhere (a file will do, tuning.db)")
    tasks, machine = built(options.measure)
    with opened(options, writable=True) as database:
        return answer(options, _searched(database, _chosen(tasks, options.only), machine, float("inf"), options))


def _searched(
    database: Database, tasks: Sequence[Task], machine: Fingerprint, bandwidth: float, options: argparse.Namespace
) -> Sequence[Progress]:
    """What became of the tasks; Ctrl-C ends the search after the one under way, a second one at once."""
    from .schedules.database.record import How
    from .schedules.tuning.search import pending, submit, time_left, tune
    from .schedules.tuning.task import ESTIMATE

    method = tasks[0].method

    def searched(task: Task, wanted: Range) -> bool:
        from .schedules.tuning.evolve import is_searched

        return is_searched(task, wanted, database, machine)

    work = pending(database, tasks, machine, tuple(How) if method == ESTIMATE else (How.MEASURED,), searched)
    say_how_long(work, bandwidth)
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

    def so_far() -> Table:
        return table(work, time_left(work, bandwidth, time.monotonic() - began))

    try:
        with Live(so_far(), console=console, auto_refresh=False) as live:
            tune(database, work, executor, stop, options.budget, lambda _: live.update(so_far(), refresh=True), widen)
    finally:
        executor.close()
        trials.close()
        signal.signal(signal.SIGINT, before)
    return work


def _executor(method: str) -> Executor:
    """A process for this kind of tasks alone: where kernels are timed there must be no TVM, which estimates need."""
    from .schedules.database.executors import LocalExecutor
    from .schedules.tuning.task import ESTIMATE, MEASURE, MEASURE_BUILT

    if method == ESTIMATE:
        from .schedules.tuning.estimate import estimate

        return LocalExecutor({method: estimate}, TASK_SECONDS)
    from .schedules.tuning.measure import measure, measure_built

    return LocalExecutor({MEASURE: measure, MEASURE_BUILT: measure_built}, TASK_SECONDS)


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
