"""MetaSchedule's evolutionary search over the designs of a task (design.py): the best traces become configurations.

TVM proposes schedules, by a cost model (gradient-boosted trees) that it learns from what was measured; candidates are
built here, and checked and timed as all others are, in a process without TVM (`measure.trial`).  What was right is
kept in the tuning database, as records of the module, and what was not, as failed: a search that was stopped goes on
from them, and none is measured twice.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from logging import getLogger
from pathlib import Path
from platform import node
from statistics import median
from threading import Event
from typing import Any

import tvm
from tvm.s_tir.meta_schedule import TuneContext, _ffi_api
from tvm.s_tir.meta_schedule.cost_model import XGBModel
from tvm.s_tir.meta_schedule.cost_model.xgb_model import XGBConfig
from tvm.s_tir.meta_schedule.database import TuningRecord
from tvm.s_tir.meta_schedule.database import Workload as TvmWorkload
from tvm.s_tir.meta_schedule.logging import get_logging_func
from tvm.s_tir.meta_schedule.mutator import MutateTileSize
from tvm.s_tir.meta_schedule.runner import RunnerResult
from tvm.s_tir.meta_schedule.search_strategy import EvolutionarySearch
from tvm.s_tir.meta_schedule.space_generator import ScheduleFn

from vllm_compile.canonical import sha256
from vllm_compile.errors import VllmCompileError
from vllm_compile.targets import resolve

from ..database import Database, Fingerprint
from ..database.executors import Executor, TaskCrashedError, TaskFailedError
from ..database.machine import fingerprint
from ..database.meta_schedule import Assessment, MetaScheduleDatabase
from ..database.record import Provenance, Verdict
from ..database.searches import note, search_of
from ..database.tasks import Lease
from ..design import TRACE, Design, text_of
from ..family import Config
from .extract import family_and_call
from .measure import TRIAL, author
from .prepare import prepare
from .task import Range, Task

ROUND = 8  # candidates that are measured together, between two lessons of the cost model
POPULATION, UNMEASURED, GENERATIONS = 64, 32, 3  # spaces have some hundred points
FINALISTS = 3  # of a range's traces: they compete with its other configurations


def evolved(
    task: Task, database: Database, executor: Executor, over: Callable[[], bool], seed: int | None = None
) -> tuple[Task, Callable[[], None]]:
    """The task with the best traces found among the configurations of each range that asks for a search.

    And what notes the searches that came to their end, to be called once their traces have competed with the others.

    Raises:
        TaskFailedError: the process that measures fails for no fault of a candidate, or the search itself does.
    """
    ranges, searches = [], []
    for wanted in task.ranges:
        found: Sequence[Config] = ()
        if wanted.traces and not over():
            try:
                searches.append(search := _Search(task, wanted, database, executor, seed))
                found = search.run(over)
            except (VllmCompileError, RuntimeError, ValueError) as error:  # of TVM, of XGBoost
                raise TaskFailedError(f"MetaSchedule's search ended: {error}") from error
        new = [config for config in found if config not in wanted.configs]
        ranges.append(replace(wanted, configs=(*wanted.configs, *new), traces=0))

    def done() -> None:
        for search in searches:
            search.note_end()

    return replace(task, ranges=tuple(ranges)), done


def is_searched(task: Task, wanted: Range, database: Database, machine: Fingerprint) -> bool:
    """True if a search for so many traces has come to its end on this very machine."""
    return search_of(database, wanted.workload, machine, _design(task, wanted).space).asked >= wanted.traces


def _design(task: Task, wanted: Range) -> Design:
    family, spec = family_and_call(task, wanted)
    design = family.design(spec, wanted.tokens, resolve(task.target))
    assert design is not None, wanted
    return design


class _Search:
    """Of one range."""

    def __init__(
        self, task: Task, wanted: Range, database: Database, executor: Executor, seed: int | None = None
    ) -> None:
        self._task, self._wanted, self._database, self._executor = task, wanted, database, executor
        self._design = _design(task, wanted)
        self._machine = fingerprint(resolve(task.target))
        space = self._design.space
        self._records = MetaScheduleDatabase(database, self._machine, self._assess, self._design.knows, space)
        self._seed = random.randrange(1, 2**31) if seed is None else seed
        self._trials: dict[str, dict[str, Any]] = {}  # by trace: what `trial` said of it
        self._known: dict[str, RunnerResult] = {}  # by a trace's digest: of this search and those before it
        self._ended = False

    def run(self, over: Callable[[], bool]) -> list[Config]:
        """The best traces, of this search and those before it."""
        target = tvm.target.Target(resolve(self._task.target).tvm_config())
        context, model = self._context(target), XGBModel(config=XGBConfig(nthread=1), num_warmup_samples=ROUND)
        workload = self._records.commit_workload(self._design.module)
        self._recall(workload)
        # TVM may propose again what is known: as many of all together as are wanted are new where they are missing.
        context.pre_tuning(self._wanted.traces, ROUND, context.generate_design_space(), self._records, model)
        stopped = False
        while (left := self._wanted.traces - len(self._known)) > 0 and not (stopped := over()):
            candidates = context.generate_measure_candidates()
            if not candidates:
                break  # the space has no more
            configs = [self._design.config(candidate.sch.trace) for candidate in candidates]
            unknown = {_key(c): c for c in self._admitted(configs) if _key(c) not in self._known}
            new = dict(list(unknown.items())[:left])
            self._learn(list(new.values()))
            results = [self._known.get(_key(c), RunnerResult(None, "it was not measured")) for c in configs]
            context.notify_runner_results(candidates, results)
            self._note(failed=[key for key in new if self._known[key].run_secs is None])
            for candidate, config, result in zip(candidates, configs, results, strict=True):
                if new.pop(_key(config), None) is not None:
                    record = TuningRecord(candidate.sch.trace, workload, result.run_secs, target, candidate.args_info)
                    self._records.commit_tuning_record(record)
            model.update(context, candidates, results)
        context.post_tuning()
        self._ended = not stopped
        best = self._records.get_top_k(workload, FINALISTS)
        return self._admitted([self._design.config(record.trace) for record in best])

    def note_end(self) -> None:
        """That so many traces have been searched for, if it was not stopped."""
        if self._ended:
            self._note(asked=self._wanted.traces)

    def _recall(self, workload: TvmWorkload) -> None:
        """Fill `_known` with what searches before this one have left."""
        failed = search_of(self._database, self._wanted.workload, self._machine, self._design.space).failed
        self._known = {key: RunnerResult(None, "it failed in a search before this") for key in failed}
        for record in self._records.get_top_k(workload, sys.maxsize):
            self._known[_key(self._design.config(record.trace))] = RunnerResult(
                [float(s) for s in record.run_secs], None
            )

    def _learn(self, new: Sequence[Config]) -> None:
        """Measure what is new, and know it; TaskFailedError where the default ends its process too."""
        trials = self._measured(new)
        if len(trials) < len(new):
            self._check_default()
        self._trials |= trials
        self._known |= {_key(config): self._result(trials.get(config[TRACE], {})) for config in new}

    def _note(self, asked: int = 0, failed: Sequence[str] = ()) -> None:
        if asked or failed:
            note(self._database, self._wanted.workload, self._machine, self._design.space, asked, failed)

    def _admitted(self, configs: Sequence[Config]) -> list[Config]:
        """Those of our spaces: what is known already may be of another version, or by somebody else."""
        return [config for config in configs if self._design.admits(config[TRACE])]

    def _context(self, target: tvm.target.Target) -> TuneContext:
        """As `TuneContext(...)`, without TVM's own tensor intrinsics: to read them takes a minute."""
        space = ScheduleFn(self._design.spaces, [], [], {MutateTileSize(): 1.0})
        strategy = EvolutionarySearch(
            population_size=POPULATION, init_min_unmeasured=UNMEASURED, genetic_num_iters=GENERATIONS
        )
        context = TuneContext.__new__(TuneContext)
        module, name, threads, log = self._design.module, "main", 1, get_logging_func(getLogger(__name__))
        create = _ffi_api.TuneContext
        context.__init_handle_by_constructor__(create, module, target, space, strategy, name, threads, self._seed, log)
        _ffi_api.TuneContextInitialize(context)
        return context

    def _measured(self, configs: Sequence[Config]) -> dict[str, dict[str, Any]]:
        """What `trial` says of each, by trace; nothing of those that end its process."""
        if not configs:
            return {}
        try:
            return {c[TRACE]: trial for c, trial in zip(configs, self._try(configs), strict=True)}
        except TaskCrashedError:
            half = len(configs) // 2
            return self._measured(configs[:half]) | self._measured(configs[half:]) if half else {}

    def _check_default(self) -> None:
        """Raise TaskFailedError if not even the default can be tried: then no candidate is to blame."""
        try:
            self._try(self._wanted.configs[:1])
        except TaskCrashedError as error:
            raise TaskFailedError(f"nothing can be measured here, the default neither: {error}") from error

    def _try(self, configs: Sequence[Config]) -> list[dict[str, Any]]:
        payload = replace(self._task, ranges=(replace(self._wanted, configs=tuple(configs)),)).payload()
        with tempfile.TemporaryDirectory() as folder:
            prepare(payload, Path(folder))
            return self._executor.run(Lease(0, TRIAL, {"folder": folder}, 0, 1), Event()).result

    def _result(self, trial: dict[str, Any]) -> RunnerResult:
        if not trial:
            return RunnerResult(None, "it ended its process")
        if trial["error"] > 1:
            return RunnerResult(None, f"its result is {trial['error']} times as far off as is allowed")
        return RunnerResult([us / 1e6 for us in trial["us"]], None)

    def _assess(self, record: TuningRecord) -> Assessment:
        trial = self._trials[text_of(record.trace)]
        rate = trial["moved_bytes"] / median(trial["us"]) * 1e6
        return Assessment(
            Verdict(trial["error"], 1.0, trial["executed_on"]),
            rate / 1e9,
            rate / trial["bandwidth"],
            Provenance(author(), int(time.time()), node(), version("vllm-compile")),
        )


def _key(config: Config) -> str:
    """What a search knows a trace by."""
    return sha256(config[TRACE])
