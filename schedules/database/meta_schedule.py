"""The database as TVM's MetaSchedule sees it: a `PyDatabase` for one machine.

MetaSchedule hands over what it has measured without a word on whether the results were right, and a record without a
comparison is not taken.  So whoever tunes says how each of its records was checked: `assess`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from sqlalchemy import Select, select
from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.database import PyDatabase, TuningRecord
from tvm.s_tir.meta_schedule.database import Workload as TvmWorkload

from ..design import plain
from . import store
from .fingerprint import Fingerprint
from .home import Database
from .intern import intern
from .record import How, Provenance, Record, Schedule, ScheduleKind, State, Times, Verdict
from .rows import record_of, select_records
from .schema import records, targets, workloads
from .workload import Workload


@dataclass(frozen=True)
class Assessment:
    """What MetaSchedule does not say of a measurement; see `Record`."""

    verdict: Verdict
    gb_per_s: float
    roofline_share: float
    provenance: Provenance


Assess = Callable[[TuningRecord], Assessment | None]  # None: the candidate's output was wrong, or not compared


@derived_object
class MetaScheduleDatabase(PyDatabase):
    """Records of traces, measured on exactly `target`; modules are the same if TVM finds them structurally equal.

    Failed runs, and records that `assess` has no word for, are not stored.  Traces that `admits` refuses, as JSON, are
    not read: TVM replays what it reads, whoever wrote it.  Nor are traces of another `space` (its digest): the same
    steps may make another kernel there.
    """

    def __init__(
        self,
        database: Database,
        target: Fingerprint,
        assess: Assess,
        admits: Callable[[Any], bool] = lambda trace: True,
        space: str = "",
    ) -> None:
        super().__init__()
        self._database = database
        self._target = target
        self._assess = assess
        self._admits = admits
        self._space = space

    def has_workload(self, mod: tvm.IRModule) -> bool:
        return bool(self._same(mod))

    def commit_workload(self, mod: tvm.IRModule) -> TvmWorkload:
        for _, text in self._same(mod):
            return _to_tvm(text)
        workload = TvmWorkload(mod)
        if self._database.writable:  # TVM calls this for each query too
            new = _from_tvm(workload)
            with self._database.writing() as connection:
                intern(connection, workloads, new.key, new.text)
        return workload

    def commit_tuning_record(self, record: TuningRecord) -> None:
        seconds = [float(second) for second in record.run_secs or ()]
        assessment = self._assess(record) if seconds and max(seconds) < 1e9 else None  # 1e10 is TVM's word for failed
        if assessment is None:
            return
        trace, _, target, arguments = plain(record.as_json())
        p10, median, p90 = np.percentile(np.array(seconds) * 1e6, (10, 50, 90)).tolist()
        same = self._same(record.workload.mod)
        workload = Workload.from_text(same[0][1]) if same else _from_tvm(record.workload)
        new = Record(
            workload,
            self._target,
            Schedule.trace({"trace": trace, "target": target, "arguments": arguments, "space": self._space}),
            How.MEASURED,
            Times(median, p10, p90),
            assessment.gb_per_s,
            assessment.roofline_share,
            assessment.verdict,
            assessment.provenance,
        )
        store.commit(self._database, [new])

    def get_top_k(self, workload: TvmWorkload, top_k: int) -> list[TuningRecord]:
        numbers = [number for number, _ in self._same(workload.mod)]
        return self._load(records.c.workload_id.in_(numbers), limit=top_k)

    def get_all_tuning_records(self) -> list[TuningRecord]:
        return self._load()

    def __len__(self) -> int:
        return len(self.get_all_tuning_records())

    # TVM's part is done outside of transactions, which keep others from writing to a SQLite file.

    def _same(self, mod: tvm.IRModule) -> Sequence[tuple[int, str]]:
        """Id and text of each workload stored that equals the module: several, where databases were merged."""
        key = Workload.of_module(_hash(mod), "").key
        with self._database.reading() as connection:
            rows = connection.execute(select(workloads.c.id, workloads.c.text).where(workloads.c.digest == key)).all()
        return [(row.id, row.text) for row in rows if tvm_ffi.structural_equal(_to_tvm(row.text).mod, mod)]

    def _of_traces(self, *conditions: Any) -> Select[Any]:
        return (
            select_records()
            .where(targets.c.digest == self._target.key, targets.c.text == self._target.text, *conditions)
            .where(records.c.schedule_kind == ScheduleKind.TRACE, records.c.how == How.MEASURED)
            .where(records.c.state != State.RETIRED)
            .order_by(records.c.median_us, records.c.id)
        )

    def _load(self, *conditions: Any, limit: int | None = None) -> list[TuningRecord]:
        with self._database.reading() as connection:
            rows = connection.execute(self._of_traces(*conditions)).all()
        found: list[TuningRecord] = []
        for row in rows:
            if len(found) == limit:
                break
            record, _ = record_of(row, self._database.name)
            content = record.schedule.content()
            if "arguments" not in content or content.get("space", "") != self._space:  # a call's, or of other spaces
                continue
            if not self._admits(content["trace"]):
                continue
            seconds = [record.times.median / 1e6]
            saved = [content["trace"], seconds, content["target"], content["arguments"]]
            found.append(TuningRecord.from_json(saved, _to_tvm(record.workload.text)))
        return found


def _hash(mod: tvm.IRModule) -> str:
    return str(tvm_ffi.structural_hash(mod))


def _from_tvm(workload: TvmWorkload) -> Workload:
    return Workload.of_module(_hash(workload.mod), tvm.ir.save_json(workload.mod))


def _to_tvm(text: str) -> TvmWorkload:
    return TvmWorkload(tvm.ir.load_json(json.loads(text)["module"]))
