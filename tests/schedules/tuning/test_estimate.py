"""Tuning for a chip that is not at hand: ranked by a model, said to be, and never mixed with what was measured."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import inf

import pytest

from tests import models
from tests.conftest import SEED
from tests.rocm_on_host import needs_lld
from vllm_compile.cli import main
from vllm_compile.driver import CompileOptions, compile_model, lower_model
from vllm_compile.schedules.database import How, Match, Verdict, commit, lookup, open_database
from vllm_compile.schedules.database.machine import fingerprint
from vllm_compile.schedules.database.store import select_where
from vllm_compile.schedules.tuning import estimate as estimating
from vllm_compile.schedules.tuning.extract import tasks_of
from vllm_compile.schedules.tuning.search import pending
from vllm_compile.targets import resolve

pytestmark = needs_lld
TARGET = resolve("rocm")
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("estimate") / "model"
    models.llama(SEED, dtype="bfloat16", **SIZES).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def task(model):
    """Of the down projection: 3 ranges of 4 configurations at most."""
    tasks = tasks_of(lower_model(model, TARGET), TARGET, trials=4)
    return next(task for task in tasks if "model_mlp_down_proj_weight" in task.names)


@pytest.fixture(scope="module")
def outcome(task):
    return estimating.estimate(json.loads(json.dumps(task.payload())))


def test_every_configuration_is_ranked(task, outcome):
    for r, summary in zip(task.ranges, outcome.result, strict=True):
        records = [record for record in outcome.records if record.workload == r.workload]
        assert summary["tried"] == len(r.configs) == 4
        assert len(records) <= len(r.configs)
        configs = [record.schedule.content()["config"] for record in records]
        assert r.configs[0] in configs
        assert all(config in r.configs for config in configs)
        assert [record.times.median for record in records] == sorted(record.times.median for record in records)
        assert summary["best_us"] == records[0].times.median
        for record in records:
            assert (record.how, record.verdict, record.target) == (How.ESTIMATED, None, fingerprint(TARGET))
            assert 0 < record.roofline_share < 1
            assert record.gb_per_s == pytest.approx(record.roofline_share * TARGET.bandwidth / 1e9)


@pytest.mark.parametrize(
    ("times", "kept"),
    [
        ([10, 9, 11, 12], [1, 0, 2, 3]),
        ([10, 9.9, 11, 10], [0, 2]),  # hardly told apart from the default
        ([10, 9, 11, 9], [1, 0, 2]),  # not told apart at all
        ([10, inf, 12, 11], [0, 3, 2]),
        ([inf, 9, 11, 12], None),
    ],
)
def test_what_is_stored(task, monkeypatch, times, kept):
    one = replace(task, ranges=task.ranges[:1])
    configs = one.ranges[0].configs
    monkeypatch.setattr(estimating._Case, "_seconds", lambda case, config, tokens: times[configs.index(config)] / 1e6)
    if kept is None:
        with pytest.raises(RuntimeError, match=r"the default .* does not fit AMD Instinct MI300X"):
            estimating.estimate(one.payload())
        return
    outcome = estimating.estimate(one.payload())
    assert [record.schedule.content()["config"] for record in outcome.records] == [configs[i] for i in kept]
    assert outcome.result[0]["unfit"] == [configs[i] for i, taken in enumerate(times) if taken == inf]


def test_what_was_measured_comes_first(task, outcome, database, tmp_path):
    """However fast the estimate; and on another architecture there is neither."""
    best, machine = outcome.records[0], fingerprint(TARGET)
    workload = best.workload
    assert [progress.state for progress in pending(database, [task], machine, tuple(How))] == ["waiting"]
    commit(database, outcome.records)
    assert [progress.state for progress in pending(database, [task], machine, tuple(How))] == ["known"]
    assert [progress.state for progress in pending(database, [task], machine)] == ["waiting"], "not measured"
    measured = replace(
        best,
        schedule=outcome.records[1].schedule,
        how=How.MEASURED,
        times=replace(best.times, median=1e6, p90=1e6),
        verdict=Verdict(0.0, 1.0, "a GPU"),
    )
    assert lookup(database, workload, machine, tuple(How)).record == best
    with open_database(tmp_path / "stale.db") as other:  # what was measured with an older TVM hides no estimate
        commit(other, [replace(measured, target=replace(machine, tvm="older"))])
        assert [progress.state for progress in pending(other, [task], machine, tuple(How))] == ["waiting"]
        commit(other, outcome.records)
        assert [progress.state for progress in pending(other, [task], machine, tuple(How))] == ["known"]
    assert lookup(database, workload, fingerprint(resolve("gfx950")), tuple(How)) is None
    commit(database, [measured])
    answer = lookup(database, workload, machine, tuple(How))
    assert (answer.record, answer.match) == (measured, Match.EXACT)


def test_another_chip_by_name(task):
    """Built for it, and said to be."""
    there = resolve("gfx950")
    one = replace(task.only(()), target=there.resolved_by, ranges=task.ranges[:1])
    record = estimating.estimate(one.payload()).records[0]
    assert (record.target.arch, record.target.device, record.target.cores) == ("gfx950", "AMD Instinct MI355X", 256)
    assert record.gb_per_s == pytest.approx(record.roofline_share * there.bandwidth / 1e9)


def test_from_the_command_line_to_the_manifest(model, tmp_path, capsys):
    url, artifact = str(tmp_path / "tuning.db"), tmp_path / "artifact"
    command = ["tune", "--model", str(model), "--target", "rocm", "--db", url, "--trials", "3", "--json"]
    assert main([*command, "--only", "down_proj,paged"]) == 0
    said = capsys.readouterr()
    tasks = json.loads(said.out.splitlines()[-1])["tasks"]
    assert [(task["state"], task["wrong"], task["failed"]) for task in tasks] == [("done", 0, 0)] * 2
    assert "estimate what is not known" in said.err

    made = compile_model(model, "rocm", artifact, CompileOptions(db=url, weightless=True)).artifact
    kernels = json.loads((made / "manifest.json").read_text())["kernels"]
    ours = [kernel["record"] for kernel in kernels if kernel["record"] is not None]
    assert {(record["how"], record["match"]) for record in ours} == {("estimated", "exact")}
    assert {k["op"] for k in kernels if k["record"] is not None} == {"linear", "paged_attention"}
    assert main(["db", "--db", url, "explain", str(made)]) == 0
    assert re.search(r"estimated for AMD Instinct MI300X \(.*µs", " ".join(capsys.readouterr().err.split()))
    assert main(["db", "--db", url, "list", "--json"]) == 0
    assert {item["how"] for item in json.loads(capsys.readouterr().out.splitlines()[-1])} == {"estimated"}
    assert main(["db", "--db", url, "stats", "--json"]) == 0
    stats = json.loads(capsys.readouterr().out.splitlines()[-1])
    with open_database(url, writable=False) as database:
        stored = select_where(database)
    assert (stats["estimates"]["candidate"], stats["records"]["candidate"]) == (len(stored), 0)
    assert main(["db", "--db", url, "promote", ours[0]["id"]]) == 2
    assert "is an estimate and candidate, only what is verified can be promoted" in capsys.readouterr().err
    assert {record["id"] for record in ours} <= {record.id for record, _ in stored}
