"""TVM's MetaSchedule over the database: a record of a small workload, committed and found again."""

from __future__ import annotations

import pytest
import tvm
from tvm import te
from tvm.s_tir import Schedule
from tvm.s_tir.meta_schedule.database import TuningRecord, Workload

from vllm_compile.schedules.database import Provenance, Verdict, commit, home, open_database
from vllm_compile.schedules.database.meta_schedule import Assessment, MetaScheduleDatabase

from .samples import CPU, H200, record

TARGET = tvm.target.Target({"kind": "llvm", "num-cores": 2})


def add_one(size: int, name: str = "x") -> tvm.IRModule:
    x = te.placeholder((size, size), "float32", name)
    y = te.compute((size, size), lambda i, j: x[i, j] + 1.0, name="y")
    return tvm.IRModule({"main": te.create_prim_func([x, y])})


def split(module: tvm.IRModule, factor: int) -> Schedule:
    schedule = Schedule(module)
    first, _ = schedule.get_loops(schedule.get_sblock("y"))
    schedule.split(first, [None, factor])
    return schedule


def assess(record) -> Assessment:
    return Assessment(
        Verdict(0.0, 1e-6, "device"), 10.0, 0.5, Provenance("a tester", 1_750_000_000, "alpha", "0123abc")
    )


def measured(database, module, factor: int, seconds: list[float]) -> TuningRecord:
    workload = database.commit_workload(module)
    trace = split(module, factor).trace
    return TuningRecord(trace, workload, seconds, TARGET, [])


@pytest.fixture
def adapter(database):
    return MetaScheduleDatabase(database, CPU, assess)


def test_the_fastest_is_found_by_an_equal_module(adapter, url):
    for factor, seconds in ((2, [3e-6, 2e-6]), (4, [1e-6, 1e-6]), (8, [5e-6])):
        adapter.commit_tuning_record(measured(adapter, add_one(16), factor, seconds))
    with open_database(url, writable=False) as again:  # as another process would
        found = MetaScheduleDatabase(again, CPU, assess).query_tuning_record(add_one(16), TARGET, "main")
        assert [float(second) for second in found.run_secs] == pytest.approx([1e-6])
        replayed = Schedule(add_one(16))
        found.trace.apply_to_schedule(replayed, remove_postproc=False)
        tvm.ir.assert_structural_equal(replayed.mod, split(add_one(16), 4).mod)


def test_no_answer_for_another_module_or_machine(adapter, database):
    adapter.commit_tuning_record(measured(adapter, add_one(16), 2, [1e-6]))
    assert adapter.has_workload(add_one(16))
    assert not adapter.has_workload(add_one(8))
    assert adapter.query_tuning_record(add_one(8), TARGET, "main") is None
    elsewhere = MetaScheduleDatabase(database, H200, assess)
    assert elsewhere.query_tuning_record(add_one(16), TARGET, "main") is None
    assert len(adapter) == 1
    assert len(elsewhere) == 0


def test_what_failed_or_was_not_compared_is_not_stored(adapter, database):
    adapter.commit_tuning_record(measured(adapter, add_one(16), 2, [1e10]))
    unchecked = MetaScheduleDatabase(database, CPU, lambda record: None)
    unchecked.commit_tuning_record(measured(unchecked, add_one(16), 2, [1e-6]))
    assert len(adapter) == 0
    adapter.commit_tuning_record(measured(adapter, add_one(16), 2, [1e-6]))
    assert len(adapter) == 1


def test_top_k_is_in_order(adapter):
    for factor, second in ((2, 3e-6), (4, 1e-6), (8, 2e-6)):
        adapter.commit_tuning_record(measured(adapter, add_one(16), factor, [second]))
    best = adapter.get_top_k(Workload(add_one(16)), 2)
    assert [float(record.run_secs[0]) for record in best] == pytest.approx([1e-6, 2e-6])


def test_others_may_write_while_traces_are_looked_at(adapter, database, url, monkeypatch):
    """To replay them takes seconds; on SQLite a transaction would keep them out."""
    monkeypatch.setattr(home, "BUSY_SECONDS", 1)
    adapter.commit_tuning_record(measured(adapter, add_one(16), 2, [1e-6]))
    numbers = iter(range(100, 200))

    def admits(trace):
        with open_database(url) as other:
            commit(other, [record(us=next(numbers))])
        return True

    reader = MetaScheduleDatabase(database, CPU, assess, admits)
    assert len(reader) == 1
    assert len(reader.get_top_k(reader.commit_workload(add_one(16)), 5)) == 1
    assert next(numbers) == 102


def test_collision_of_structural_hashes(adapter, monkeypatch):
    monkeypatch.setattr("vllm_compile.schedules.database.meta_schedule._hash", lambda module: "1")
    adapter.commit_tuning_record(measured(adapter, add_one(16), 2, [1e-6]))
    adapter.commit_tuning_record(measured(adapter, add_one(8), 4, [2e-6]))
    found = adapter.query_tuning_record(add_one(8), TARGET, "main")
    assert float(found.run_secs[0]) == pytest.approx(2e-6)
    assert adapter.query_tuning_record(add_one(4), TARGET, "main") is None
