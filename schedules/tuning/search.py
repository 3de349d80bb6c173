"""Goes through the tasks of a model: measures, commits, reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import exp, log
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING

from vllm_compile.canonical import canonical

from ..database import Database, Fingerprint, How, Match, Record, commit, lookup
from ..database.executors import Executor, Outcome, TaskCrashedError, TaskFailedError
from ..database.tasks import Lease
from ..database.tasks import submit as queue
from .task import MEASURE, Range, Task

if TYPE_CHECKING:
    from ..family import Config

BUILD_SECONDS, CALLS = 0.3, 10  # of a candidate: to build it, and how often it is called, roughly


@dataclass
class Progress:
    """What is known of one task so far.

    Attributes:
        state: waiting, queued, running, done, known (the database has all of it) or failed.
        tried, wrong, failed: candidates that were measured or estimated; whose result was wrong; that crashed, hung,
            or do not fit the chip.
        speedups: of each range, the default's time over the best's.
        best_us, gb_per_s, roofline_share: of the best configuration for the fewest tokens.
        reason: why it failed.
    """

    task: Task
    state: str = "waiting"
    tried: int = 0
    wrong: int = 0
    failed: int = 0
    speedups: list[float] = field(default_factory=list)
    best_us: float = 0.0
    gb_per_s: float = 0.0
    roofline_share: float = 0.0
    reason: str = ""

    def gain(self) -> float:
        """Geometric mean of the speedups."""
        return exp(sum(map(log, self.speedups)) / len(self.speedups)) if self.speedups else 1.0


def pending(
    database: Database,
    tasks: Sequence[Task],
    machine: Fingerprint,
    hows: Sequence[How] = (How.MEASURED,),
    problem: Callable[[Task, Range, Config], str] = lambda task, wanted, config: "",
    searched: Callable[[Task, Range], bool] = lambda task, wanted: True,
) -> list[Progress]:
    """The tasks, less the ranges that this very machine has fresh records of; `hows` says which ones count.

    So do only those whose configuration `compile` would use: `problem` says why it would not.
    Of a range that asks for traces and has not been `searched` to the end, only traces are left to be tried, beside the
    default and what is the best so far.
    """

    def left(task: Task, wanted: Range) -> Range | None:
        known = [  # one by one: a stale record hides no fresh one
            answer.record.schedule.content()["config"]
            for how in hows
            if (answer := lookup(database, wanted.workload, machine, (how,), partial(fits, task, wanted))) is not None
            and answer.match == Match.EXACT
            and not answer.stale
        ]
        if not known:
            return wanted
        if not wanted.traces or searched(task, wanted):
            return None
        default = wanted.configs[0]
        return replace(wanted, configs=(default, *(config for config in known[:1] if config != default)))

    def fits(task: Task, wanted: Range, record: Record) -> bool:
        return not record.schedule.problem(task.family, wanted.configs[0], partial(problem, task, wanted))

    found = []
    for task in tasks:
        ranges = tuple(r for wanted in task.ranges if (r := left(task, wanted)) is not None)
        found.append(Progress(replace(task, ranges=ranges), "waiting" if ranges else "known"))
    return found


def expected_seconds(tasks: Sequence[Task], gb_per_s: float) -> float:
    """Seconds that a search will take, roughly: building, and reading the weights at so many GB/s (or never: inf)."""
    seconds = 0.0
    for task in tasks:
        weights = task.step_bytes / max(task.calls, 1)
        calls = sum((len(r.configs) + r.traces) * max(1, r.tokens / 8) for r in task.ranges) * CALLS
        built = len(task.configs()) + sum(1 + r.traces for r in task.ranges)
        seconds += BUILD_SECONDS * built + calls * weights / gb_per_s / 1e9
    return seconds


def time_left(work: Sequence[Progress], gb_per_s: float, spent: float) -> float:
    """Seconds that what is not done yet will take, by `expected_seconds` and the time (`spent`) of what is done."""
    done = expected_seconds([p.task for p in work if p.state in ("done", "failed")], gb_per_s)
    rest = expected_seconds([p.task for p in work if p.state in ("waiting", "running")], gb_per_s)
    return rest * (spent / done if done else 1.0)


def submit(database: Database, work: Sequence[Progress], machine: Fingerprint) -> int:
    """Queue what waits for workers with such a machine, the costliest first; gives how many tasks were new."""
    waiting = [progress for progress in work if progress.state == "waiting"]
    for progress in waiting:
        progress.state = "queued"
    payloads = [(p.task.payload() | {"machine": machine.text}, float(p.task.step_bytes)) for p in waiting]
    return sum(queue(database, MEASURE, [payload], priority, machine=machine) for payload, priority in payloads)


def tune(
    database: Database,
    work: Sequence[Progress],
    executor: Executor,
    stop: Event,
    budget: float = float("inf"),
    report: Callable[[Progress], None] = lambda progress: None,
    widen: Callable[[Task, Callable[[], bool]], tuple[Task, Callable[[], None]]] = lambda task, over: (task, _nothing),
) -> None:
    """Measure (or estimate) what waits, in order, and commit the records of each task as soon as it is done.

    Before that, `widen` may add configurations to it (its second argument says when time is up); what it gives beside
    the task is called after the commit.  When `stop` is set, or the budget (seconds) is spent, the task under way is
    the last.  A candidate that ends or hangs its process is left out, and counted.
    """
    deadline = time.monotonic() + budget

    def over() -> bool:
        return stop.is_set() or time.monotonic() > deadline

    for progress in work:
        if progress.state != "waiting":
            continue
        if over():
            return
        progress.state = "running"
        report(progress)
        try:
            progress.task, done = widen(progress.task, over)
            outcome = _measured(progress, executor, over)
        except TaskFailedError as error:
            progress.state, progress.reason = "failed", str(error)
        else:
            commit(database, outcome.records)
            done()
            progress.state = "done"
            progress.tried = sum(summary["tried"] for summary in outcome.result)
            progress.wrong = sum(len(summary.get("wrong", ())) for summary in outcome.result)
            progress.failed += sum(len(summary.get("unfit", ())) for summary in outcome.result)
            progress.speedups = [summary["default_us"] / summary["best_us"] for summary in outcome.result]
            first = outcome.records[0]
            progress.best_us, progress.gb_per_s = first.times.median, first.gb_per_s
            progress.roofline_share = first.roofline_share
        report(progress)


def _nothing() -> None:
    """What is done after the commit of a task that was not widened."""


def _measured(progress: Progress, executor: Executor, over: Callable[[], bool]) -> Outcome:
    """The outcome of a task; where candidates end the process, of what is left without them.

    Raises:
        TaskFailedError: it is not a candidate's fault, or there is no time left to find out whose.
    """
    task = progress.task
    with TemporaryDirectory() as scratch:
        tried = _Tried(executor, Path(scratch) / "candidate")
        while True:
            try:
                return tried.outcome(task)
            except TaskCrashedError:
                configs = task.configs()
                if not configs or over():
                    raise
            suspects = tried.last_of(configs)
            if progress.failed == 0:
                tried.outcome(task.only([]))  # raises what is the defaults' own
            guilty = suspects if suspects and tried.crashes(task.only(suspects)) else _guilty(task, configs, tried)
            progress.failed += len(guilty)
            task = task.only([config for config in configs if config not in guilty])


def _guilty(task: Task, configs: Sequence[Config], tried: _Tried) -> Sequence[Config]:
    """Of configurations that end the process together: one that does alone, or one half where neither does."""
    while len(configs) > 1:
        half = len(configs) // 2
        crashing = (part for part in (configs[:half], configs[half:]) if tried.crashes(task.only(part)))
        if (part := next(crashing, None)) is None:
            return configs[half:]
        configs = part
    return configs


@dataclass(frozen=True)
class _Tried:
    """What an executor makes of tasks.

    Attributes:
        note: a file in which measure.py leaves the configuration that it is about to call (canonical JSON).
    """

    executor: Executor
    note: Path

    def outcome(self, task: Task) -> Outcome:
        return self.executor.run(Lease(0, task.method, task.payload() | {"note": str(self.note)}, 0, 1), Event())

    def crashes(self, task: Task) -> bool:
        try:
            self.outcome(task)
        except TaskCrashedError:
            return True
        return False

    def last_of(self, configs: Sequence[Config]) -> Sequence[Config]:
        """The one that was called last, if it is one of these: the first to be suspected of a crash."""
        last = self.note.read_text() if self.note.exists() else ""
        return [config for config in configs if canonical(config) == last]
