"""MetaSchedule's evolutionary search over the designs of a task (design.py): the best traces become configurations.

TVM proposes schedules, by a cost model (gradient-boosted trees) that it learns from what was measured; candidates are
built here, and checked and timed as all others are, in a process without TVM (`measure.trial`).  What was right is
kept in the tuning database, as records of the module; a search that was stopped goes on from them.
"""

from __future__ import annotations

import json
import random
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
from tvm.s_tir.meta_schedule.logging import get_logging_func
from tvm.s_tir.meta_schedule.mutator import MutateTileSize
from tvm.s_tir.meta_schedule.runner import RunnerResult
from tvm.s_tir.meta_schedule.search_strategy import EvolutionarySearch
from tvm.s_tir.meta_schedule.space_generator import ScheduleFn

from vllm_compile.errors import VllmCompileError
from vllm_compile.targets import resolve

from ..database import Database, Fingerprint
from ..database.executors import Executor, TaskCrashedError, TaskFailedError
from ..database.machine import fingerprint
from ..database.meta_schedule import Assessment, MetaScheduleDatabase
from ..database.record import Provenance, Verdict
from ..database.tasks import Lease
from ..design import TRACE, Design, text_of
from ..family import Config
from ..select import FAMILIES
from .measure import TRIAL, author
from .prepare import call_of, prepare
from .task import Range, Task

ROUND = 8  # candidates that are measured together, between two lessons of the cost model
POPULATION, UNMEASURED, GENERATIONS = 64, 32, 3  # spaces have some hundred points
FINALISTS = 3  # of a range's traces: they compete with its other configurations


def evolved(
    task: Task, database: Database, executor: Executor, over: Callable[[], bool], seed: int | None = None
) -> Task:
    """The task with the best traces found among the configurations of each range that asks for a search.

    Raises:
        TaskFailedError: the process that measures fails for no fault of a candidate, or the search itself does.
    """
    ranges = []
    for wanted in task.ranges:
        found: Sequence[Config] = ()
        if wanted.traces and not over():
            try:
                found = _Search(task, wanted, database, executor, seed).run(over)
            except (VllmCompileError, RuntimeError, ValueError) as error:  # of TVM, of XGBoost
                raise TaskFailedError(f"MetaSchedule's search ended: {error}") from error
        ranges.append(replace(wanted, configs=(*wanted.configs, *found), traces=0))
    return replace(task, ranges=tuple(ranges))


def is_searched(task: Task, wanted: Range, database: Database, machine: Fingerprint) -> bool:
    """True if the database has traces of the range's module that were measured on this very machine."""
    records = MetaScheduleDatabase(database, machine, lambda record: None)
    return records.has_records(_design(task, wanted).module)


def _design(task: Task, wanted: Range) -> Design:
    target = resolve(task.target)
    family = next(family for family in FAMILIES[target.name] if family.name == task.family)
    design = family.design(call_of(json.loads(wanted.workload.text)), wanted.tokens, target)
    assert design is not None, wanted
    return design


class _Search:
    """Of one range."""

    def __init__(
        self, task: Task, wanted: Range, database: Database, executor: Executor, seed: int | None = None
    ) -> None:
        self._task, self._wanted, self._executor = task, wanted, executor
        self._design = _design(task, wanted)
        self._machine = fingerprint(resolve(task.target))
        self._records = MetaScheduleDatabase(database, self._machine, self._assess, self._design.knows)
        self._seed = random.randrange(1, 2**31) if seed is None else seed
        self._tried: dict[str, dict[str, Any]] = {}  # by trace: what `trial` said of it

    def run(self, over: Callable[[], bool]) -> list[Config]:
        """The best traces, of this search and those before it."""
        target = tvm.target.Target(resolve(self._task.target).tvm_config())
        context, model = self._context(target), XGBModel(config=XGBConfig(nthread=1), num_warmup_samples=ROUND)
        workload = self._records.commit_workload(self._design.module)
        context.pre_tuning(self._wanted.traces, ROUND, context.generate_design_space(), self._records, model)
        while not over() and (candidates := context.generate_measure_candidates()):
            configs = [self._design.config(candidate.sch.trace) for candidate in candidates]
            self._tried |= self._measured(self._admitted(configs))
            results = [self._result(self._tried.get(config[TRACE], {})) for config in configs]
            context.notify_runner_results(candidates, results)
            for candidate, result in zip(candidates, results, strict=True):
                record = TuningRecord(candidate.sch.trace, workload, result.run_secs, target, candidate.args_info)
                self._records.commit_tuning_record(record)
            model.update(context, candidates, results)
        context.post_tuning()
        best = self._records.get_top_k(workload, FINALISTS)
        return self._admitted([self._design.config(record.trace) for record in best])

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

    def _try(self, configs: Sequence[Config]) -> list[dict[str, Any]]:
        payload = replace(self._task, ranges=(replace(self._wanted, configs=tuple(configs)),)).payload()
        with tempfile.TemporaryDirectory() as folder:
            prepare(payload, Path(folder))
            return self._executor.run(Lease(0, TRIAL, {"folder": folder}, 0, 1), Event()).result

    def _result(self, trial: dict[str, Any]) -> RunnerResult:
        if not trial:
            return RunnerResult(None, "it ended its process, or is of no space of this version")
        if trial["error"] > 1:
            return RunnerResult(None, f"its result is {trial['error']} times as far off as is allowed")
        return RunnerResult([us / 1e6 for us in trial["us"]], None)

    def _assess(self, record: TuningRecord) -> Assessment:
        trial = self._tried[text_of(record.trace)]
        rate = trial["moved_bytes"] / median(trial["us"]) * 1e6
        return Assessment(
            Verdict(trial["error"], 1.0, trial["executed_on"]),
            rate / 1e9,
            rate / trial["bandwidth"],
            Provenance(author(), int(time.time()), node(), version("vllm-compile")),
        )
