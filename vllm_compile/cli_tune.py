"""The command line of tuning: `vllm-compile tune`."""

from __future__ import annotations

import argparse
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
from .cli_tune_options import DEFAULTS, add_options, check, set_defaults
from .cli_tune_table import answer, console, say_how_long, table
from .errors import DatabaseError, TargetError, VllmCompileError

if TYPE_CHECKING:
    from .schedules.database import Database, Fingerprint
    from .schedules.database.executors import Executor
    from .schedules.family import Config
    from .schedules.tuning.search import Progress
    from .schedules.tuning.task import Range, Task

TASK_SECONDS = 1800  # after which a task is taken for hung
BUILT_SECONDS = 600  # after which one is that has only to be measured
TRIAL_SECONDS = 120  # after which a few candidates are


def add_tune(commands: Any) -> None:
    """Add `tune`."""
    parser = commands.add_parser("tune", help="find the fastest configurations of a model's kernels")
    add_options(parser)
    parser.set_defaults(run=_tune)


def _tune(options: argparse.Namespace) -> int:
    from .targets import resolve

    if options.measure is not None:  # whatever this machine's own CPU is
        check(options)
        set_defaults(options)
        return _measure_built(options)
    target = resolve(options.target or DEFAULTS["target"])
    check(options, target.name)
    set_defaults(options)
    if options.model is None:
        raise VllmCompileError("--model DIR is needed (or --measure DIR, of what `tune --build DIR` made elsewhere)")
    import torch

    from .bandwidth import read_bandwidth
    from .driver import lower_model
    from .schedules.tuning.extract import METHODS, tasks_of
    from .schedules.tuning.search import Progress

    if target.name not in METHODS:
        raise TargetError("tune searches for cpu, cuda and rocm; Gaudi's kernels have no configurations to choose from")
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
    if options.build is not None and not options.dry_run:
        return _build(options, tasks)
    bandwidth = float("inf") if target.name != "cpu" else read_bandwidth(torch.device("cpu"))
    if options.db is None:
        work: Sequence[Progress] = [Progress(task) for task in tasks]
        say_how_long(work, bandwidth)
        console.print(table(work))
    else:
        from .schedules.database.machine import fingerprint

        with opened(options, writable=not options.dry_run) as database:
            work = _searched(database, tasks, fingerprint(target, options.board), bandwidth, options)
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
    with opened(options, writable=not options.dry_run) as database:
        return answer(options, _searched(database, _chosen(tasks, options.only), machine, float("inf"), options))


def _searched(
    database: Database, tasks: Sequence[Task], machine: Fingerprint, bandwidth: float, options: argparse.Namespace
) -> Sequence[Progress]:
    """What became of the tasks; Ctrl-C ends the search after the one under way, a second one at once."""
    from .schedules.database.record import How
    from .schedules.tuning.search import pending, submit, time_left, tune
    from .schedules.tuning.task import ESTIMATE, MEASURE_BUILT

    method = tasks[0].method

    def problem(task: Task, wanted: Range, config: Config) -> str:
        if task.method == MEASURE_BUILT:  # without TVM nobody can tell
            return ""
        from .schedules.tuning.extract import problem_of

        return problem_of(task, wanted, config)

    def searched(task: Task, wanted: Range) -> bool:
        from .schedules.tuning.evolve import is_searched

        return is_searched(task, wanted, database, machine)

    hows = tuple(How) if method == ESTIMATE else (How.MEASURED,)
    work = pending(database, tasks, machine, hows, problem, searched)
    say_how_long(work, bandwidth)
    if options.dry_run:
        console.print(table(work))
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

    def widen(task: Task, over: Callable[[], bool]) -> tuple[Task, Callable[[], None]]:
        if not any(wanted.traces for wanted in task.ranges):
            return task, lambda: None
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
    from .schedules.tuning.measure import measure_built, measure_noting

    seconds = BUILT_SECONDS if method == MEASURE_BUILT else TASK_SECONDS
    return LocalExecutor({MEASURE: measure_noting, MEASURE_BUILT: measure_built}, seconds)


def _trials() -> Executor:
    """A process for the candidates of a search by MetaSchedule."""
    from .schedules.database.executors import LocalExecutor
    from .schedules.tuning.measure import TRIAL, trial

    return LocalExecutor({TRIAL: trial}, TRIAL_SECONDS)


def _check_traces(tasks: Sequence[Task]) -> None:
    """Raise an error unless MetaSchedule has something to search, and what it needs."""
    if not any(wanted.traces for task in tasks for wanted in task.ranges):
        raise VllmCompileError(
            "--traces: no call here has a kernel in TIR to search; on cpu linear layers and gates of MLPs have, with "
            "--pack none"
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
