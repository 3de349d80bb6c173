"""What may be stored, how states move, what the tables themselves refuse."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import sqlalchemy
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import insert, update

from vllm_compile.canonical import canonical, sha256
from vllm_compile.errors import DatabaseError
from vllm_compile.schedules.database import (
    How,
    Schedule,
    State,
    Times,
    Verdict,
    commit,
    lookup,
    migrate,
    open_database,
    store,
    tasks,
)
from vllm_compile.schedules.database.bundle import all_records
from vllm_compile.schedules.database.home import migrate_database
from vllm_compile.schedules.database.rows import row_of
from vllm_compile.schedules.database.schema import metadata, records, targets, workloads
from vllm_compile.schedules.database.store import select_where

from .samples import CPU, H200, linear, record

HEAD = "0004"
NAN, INF = float("nan"), float("inf")


def state(database, key: str) -> State:
    return store.find(database, key)[1]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (record(verdict=None), "was not compared"),
        (record(verdict=Verdict(0.0, 1.0, "")), "was not compared"),
        (record(verdict=Verdict(2e-2, 1e-2, "device")), "output is wrong"),
        (record(verdict=Verdict(NAN, 1e-2, "device")), "output is wrong"),
        (record(verdict=Verdict(0.0, INF, "device")), "output is wrong"),
        (record(us=0), "positive"),
        (record(us=NAN), "positive"),
        (replace(record(), times=Times(10, 11, 12)), "not in order"),
    ],
)
def test_refused(database, bad, words):
    with pytest.raises(DatabaseError, match=words):
        commit(database, [record(us=5), bad])
    assert lookup(database, linear(), H200) is None  # all or none
    commit(database, [record(us=5)])
    assert lookup(database, linear(), H200) is not None


MEASURED, ESTIMATE = record(), record(how=How.ESTIMATED, verdict=None)


@pytest.mark.parametrize(
    ("good", "columns"),
    [
        (MEASURED, {"error": 1.0}),
        (MEASURED, {"error": None}),
        (MEASURED, {"error": None, "tolerance": None, "executed_on": None}),
        (MEASURED, {"executed_on": ""}),
        (MEASURED, {"p10_us": 99.0}),
        (MEASURED, {"state": "best"}),
        (MEASURED, {"how": "guessed"}),
        (ESTIMATE, {"executed_on": "device"}),
        (ESTIMATE, {"state": "verified"}),
        (ESTIMATE, {"state": "promoted"}),
    ],
)
def test_the_tables_refuse_it_too(database, good, columns):
    commit(database, [good])
    with database.reading() as connection:
        numbers = connection.execute(sqlalchemy.select(records.c.workload_id, records.c.target_id)).one()
    row = row_of(good, *numbers, State.CANDIDATE) | {"id": "f" * 64}
    with pytest.raises(sqlalchemy.exc.IntegrityError), database.engine.begin() as connection:
        connection.execute(insert(records).values(row | columns))
    with database.engine.begin() as connection:
        connection.execute(insert(records).values(row))  # without the change it is taken


def test_twice_is_once(database):
    assert commit(database, [record()]) == commit(database, [record()])
    assert store.count(database)["candidate"] == 1


def test_verified_on_two_hosts(database):
    (first,) = commit(database, [record()])
    (again,) = commit(database, [record(at=1_750_000_001)])
    commit(database, [record(config={"kind": "other"}, host="beta")])
    commit(database, [record(how=How.ESTIMATED, host="gamma")])
    assert state(database, first) == state(database, again) == State.CANDIDATE
    (second,) = commit(database, [record(host="beta")])
    assert {state(database, key) for key in (first, again, second)} == {State.VERIFIED}


def test_transitions(database):
    (key,) = commit(database, [record()])
    with pytest.raises(DatabaseError, match="is candidate, only what is verified can be promoted; it takes"):
        store.promote(database, key)
    (estimate,) = commit(database, [ESTIMATE])
    with pytest.raises(DatabaseError, match="is an estimate and candidate, only what is verified can be promoted"):
        store.promote(database, estimate)
    commit(database, [record(host="beta")])
    store.promote(database, key[:10])
    assert state(database, key) == State.PROMOTED
    store.retire(database, key)
    for move in (store.promote, store.retire):
        with pytest.raises(DatabaseError, match="is retired, only"):
            move(database, key)


@pytest.mark.parametrize("prefix", ["", "zz", "%", "_"])
def test_unknown_id(database, prefix):
    commit(database, [record()])
    with pytest.raises(DatabaseError, match="no record starts with"):
        store.find(database, prefix)


def test_ambiguous_id(database):
    ids = commit(database, [record(us=n) for n in range(1, 40)])
    prefix = next(a[0] for a in ids if sum(b[0] == a[0] for b in ids) > 1)
    with pytest.raises(DatabaseError, match="several records start"):
        store.find(database, prefix)


@pytest.mark.parametrize("column", [{"median_us": 9.5}, {"schedule": "{}"}, {"host": "elsewhere"}])
def test_an_altered_row_is_no_answer(database, column):
    (key, other) = commit(database, [record(), record(linear(N=64))])
    with database.engine.begin() as connection:
        connection.execute(update(records).where(records.c.id == key).values(column))
    with pytest.raises(DatabaseError, match="is not what was committed"):
        lookup(database, linear(), H200)
    assert lookup(database, linear(N=64), H200).record.id == other


@pytest.mark.parametrize(
    ("table", "column", "text"),
    [
        (records, "schedule", "[]"),
        (records, "schedule", "5"),
        (records, "schedule", "no JSON"),
        (records, "schedule", '{"family":"cpu.linear"}'),
        (records, "schedule", '{"config":[],"family":"cpu.linear"}'),
        (workloads, "text", "[]"),
        (workloads, "text", "{}"),
        (targets, "text", "[]"),
        (targets, "text", canonical({**json.loads(H200.text), "cores": "many"})),
    ],
)
def test_what_is_no_record_is_refused_though_its_digest_is_right(database, capsys, table, column, text):
    """Whoever wrote it: one line says which row, nothing else is told of it."""
    commit(database, [record()])
    made = record()
    content = made.content()
    texts = {"records": content["schedule"], "workloads": {"text": made.workload.text}, "targets": {"text": H200.text}}
    texts[table.name]["text"] = text
    key = sha256(canonical([texts["workloads"]["text"], texts["targets"]["text"], content]))
    with database.engine.begin() as connection:
        connection.execute(update(table).values({column: text}))
        connection.execute(update(records).values(id=key))
        connection.execute(update(workloads).values(digest=sha256(linear().text)))
    with pytest.raises(DatabaseError, match=r"is not what was committed \("):
        select_where(database)
    if table is not workloads:  # which is not found any more
        with pytest.raises(DatabaseError, match=r"is not what was committed \("):
            lookup(database, linear(), H200)
    if table is records:
        with pytest.raises(ValueError, match=r"JSON|configuration|Expecting"):
            replace(made.schedule, text=text)


@pytest.mark.parametrize("config", [{}, {"config": 5}])
def test_a_trace_of_a_family_has_a_configuration(config):
    content = {"trace": [], "target": {}, "arguments": []}
    Schedule.trace(content)
    with pytest.raises(ValueError, match="neither a kernel family's configuration nor a trace"):
        Schedule.trace({**content, "family": "cpu.linear", **config})


def test_migrations_make_the_schema(database):
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, metadata) == []
        other = sqlalchemy.MetaData()
        sqlalchemy.Table("more", other, sqlalchemy.Column("id", sqlalchemy.Integer))
        assert compare_metadata(context, other) != []


def test_migrating_keeps_what_is_there(database, url):
    """A record under the first schema, which knows of no estimates; then forward."""
    (key,) = commit(database, [MEASURED])
    tables = [table for table in metadata.sorted_tables if table.name in ("workloads", "targets", "records")]
    with database.engine.begin() as connection:
        rows = [(table, connection.execute(sqlalchemy.select(table)).mappings().one()) for table in tables]
        metadata.drop_all(connection)
        connection.exec_driver_sql("DROP TABLE alembic_version")
        config = migrate._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for table, row in rows:
            connection.execute(insert(table).values(**row))
    with pytest.raises(
        DatabaseError, match=r"schema \(0001\) is older than this version's; run: vllm-compile db migrate"
    ):
        open_database(url)
    for salvage in (False, True):
        with pytest.raises(DatabaseError, match="is older"):
            open_database(url, writable=salvage, salvage=salvage)
    with open_database(url, writable=False, salvage=True) as reader:  # a damaged one cannot be migrated
        assert [item[0].id for item in all_records(reader, salvage=True)] == [key]
    with pytest.raises(DatabaseError, match=r"(?i)not.null"):
        commit(database, [ESTIMATE])
    assert migrate_database(url) == HEAD
    with open_database(url) as migrated:
        commit(migrated, [ESTIMATE])
        assert lookup(migrated, linear(), H200).record.id == key


def test_migrating_keeps_whom_tasks_are_for(database, url):
    """Until the third schema only a task's payload said which machine it is for, if it was to be measured."""
    odd = {"machine": "gpu-box-7"}, {"machine": canonical({"kind": "cpu", "arch": "x"})}, {"machine": 7}
    given = [("measure", payload) for payload in ({"machine": CPU.text}, {"machine": H200.text}, {}, 5, *odd)]
    given += [("other", {"machine": "gpu-box-7"}), ("other", {"machine": H200.text})]
    with database.engine.begin() as connection:
        metadata.drop_all(connection)
        connection.exec_driver_sql("DROP TABLE alembic_version")
        config = migrate._config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        columns = ("kind", "payload", "digest", "state", "fence", "priority", "attempts", "max_attempts", "created_at")
        table = sqlalchemy.table("tasks", *map(sqlalchemy.column, columns))
        for kind, payload in given:
            text = canonical(payload)
            row = {"kind": kind, "payload": text, "digest": sha256(canonical([kind, text])), "created_at": 1}
            rest = {"state": "queued", "fence": 0, "priority": 1, "attempts": 0, "max_attempts": 3}
            connection.execute(insert(table).values(**row, **rest))
    assert migrate_database(url) == HEAD
    with open_database(url) as migrated:
        assert tasks.submit(migrated, "measure", [{"machine": CPU.text}], machine=CPU) == 0
        assert tasks.submit(migrated, "measure", [5]) == 0
        assert tasks.lease(migrated, "a", ["measure"], 60, [H200]).payload == {"machine": H200.text}
        free = [tasks.lease(migrated, "a", ["measure"], 60, [H200]).payload for _ in range(2 + len(odd))]
        assert free == [{}, 5, *odd]
        assert tasks.lease(migrated, "a", ["measure"], 60, [H200]) is None
        assert tasks.lease(migrated, "a", ["measure"], 60, [CPU]).payload == {"machine": CPU.text}
        assert tasks.submit(migrated, "other", [odd[0]]) == 0
        assert [tasks.lease(migrated, "a", ["other"], 60).payload for _ in range(2)] == [odd[0], {"machine": H200.text}]
        with migrated.reading() as connection:
            assert set(connection.scalars(sqlalchemy.select(targets.c.text))) == {CPU.text, H200.text}


def test_a_newer_schema_is_refused(database, url):
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseError, match=r"schema \(9999\) is newer than this version's; update"):
        open_database(url)


def test_opened_for_reading(database, url):
    commit(database, [record()])
    with open_database(url, writable=False) as reader:
        assert lookup(reader, linear(), H200) is not None
        with pytest.raises(DatabaseError, match="opened for reading"):
            commit(reader, [record(us=3)])
        with pytest.raises(sqlalchemy.exc.DBAPIError), reader.engine.begin() as connection:
            connection.exec_driver_sql("DELETE FROM records")  # not even past the API
