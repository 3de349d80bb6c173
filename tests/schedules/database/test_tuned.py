"""Compiling with a database: its configurations take the place of a family's own."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from vllm_compile import compile
from vllm_compile.cli import main
from vllm_compile.driver import CompileOptions, compile_model
from vllm_compile.errors import DatabaseError
from vllm_compile.schedules.database import How, Schedule, Verdict, commit, open_database
from vllm_compile.schedules.database.machine import fingerprint
from vllm_compile.schedules.database.tuned import TunedKernels, workload_of
from vllm_compile.schedules.select import choose, token_ranges
from vllm_compile.schedules.tuning.search import pending
from vllm_compile.schedules.tuning.task import Range, Task
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets import resolve

from .samples import record


def linear_call(N: int, K: int, dtype: str) -> OpSpec:
    x, weight = TensorSpec((Sym.TOKENS, K), dtype), TensorSpec((N, K), dtype)
    return OpSpec("linear", (("x", x), ("weight", weight)), (TensorSpec((Sym.TOKENS, N), dtype),))


CALL = linear_call(4096, 4096, "bfloat16")


def tune(database, call: OpSpec, target, index: int, config: dict, family: str | None = None, **about):
    """Commit a record for the variant `index` of the call."""
    choice = choose(call, target)
    tokens = token_ranges(choice.variants, choice.vendor)[index]
    made = record(workload_of(call, choice.layouts, tokens), fingerprint(target), **about)
    made = replace(made, schedule=Schedule.of_family(family or choice.family.name, config))
    return commit(database, [made])[0]


@pytest.mark.parametrize("name", ["cpu", "cuda", "rocm"])
class TestChoice:
    @pytest.fixture
    def target(self, name):
        return resolve(name)

    @pytest.fixture
    def other(self, target):
        """A configuration for the first variant that is not its default."""
        choice = choose(CALL, target)
        default = choice.variants[0].config
        return next(
            config
            for config in choice.family.space(CALL, target)
            if config != default and choice.family.admits(CALL, config, 1, target)
        )

    def chosen(self, database, target):
        return choose(CALL, target, tuned=TunedKernels(database, fingerprint(target))).variants

    def test_a_record_takes_the_place_of_the_default(self, database, target, other):
        default = choose(CALL, target).variants
        assert self.chosen(database, target) == list(default)
        key = tune(database, CALL, target, 0, other)
        first, *rest = self.chosen(database, target)
        assert (first.min_tokens, first.config) == (1, other)
        assert (first.record["id"], first.record["match"], first.record["host"]) == (key, "exact", "alpha")
        assert rest == list(default[1:])

    def test_an_estimate_only_where_nothing_was_measured(self, database, target, other):
        default = choose(CALL, target).variants[0].config
        estimate = tune(database, CALL, target, 0, other, how=How.ESTIMATED, verdict=None, us=1)
        first = self.chosen(database, target)[0]
        assert (first.config, first.record["id"], first.record["how"]) == (other, estimate, "estimated")
        measured = tune(database, CALL, target, 0, default, us=1000)
        assert self.chosen(database, target)[0].record["id"] == measured

    def test_what_does_not_fit_is_passed_over(self, database, target, other):
        """And named; the next best takes its place."""
        default = choose(CALL, target).variants
        odd = tune(database, CALL, target, 0, {**other, "prefetch": -1, "row_tiles": 3}, us=1)
        tune(database, CALL, target, 0, {"prefetch": "far"}, us=2)
        foreign = tune(database, CALL, target, 1, other, family="another.family")
        first, second, *_ = chosen = self.chosen(database, target)
        assert [replace(variant, passed_over=None) for variant in chosen] == list(default)
        assert (first.passed_over["id"], first.passed_over["host"]) == (odd, "alpha")
        assert "makes no such kernel" in first.passed_over["reason"]
        assert (second.passed_over["id"], second.passed_over["reason"]) == (foreign, "it is of another kernel family")
        good = tune(database, CALL, target, 0, other, us=9)
        first = self.chosen(database, target)[0]
        assert (first.config, first.record["id"], first.passed_over["id"]) == (other, good, odd)


def test_a_default_that_its_family_does_not_list_is_known(database):
    """To `compile` as to `tune`: whoever has measured it knows it."""
    target = resolve("cpu")
    choice = choose(CALL, target)
    tokens, (default, *_) = token_ranges(choice.variants, choice.vendor)[0], choice.variants
    key = tune(database, CALL, target, 0, default.config)
    tuned = TunedKernels(database, fingerprint(target))
    asked = choice.family, CALL, choice.layouts, tokens
    found = tuned.find(*asked, default, lambda config: "no")
    assert (found.record["id"], found.passed_over) == (key, None)
    found = tuned.find(*asked, replace(default, config={"another": 1}), lambda config: "no")
    assert (found.record, found.passed_over["id"]) == (None, key)
    task = Task("measure", choice.family.name, "cpu", (), 1, 1, ())
    for first, state in ((default.config, "known"), ({"another": 1}, "waiting")):
        one = replace(task, ranges=(Range(workload_of(CALL, choice.layouts, tokens), 1, (first,)),))
        (progress,) = pending(database, [one], fingerprint(target), problem=lambda task, wanted, config: "no")
        assert progress.state == state


def test_more_rows_than_tokens_are_passed_over(database):
    target = resolve("cpu")
    choice = choose(CALL, target)
    many = next(config for config in choice.family.space(CALL, target) if config["rows"] > 1)
    tune(database, CALL, target, 0, many)
    assert choose(CALL, target, tuned=TunedKernels(database, fingerprint(target))).variants[0].record is None


@pytest.mark.parametrize(
    ("name", "device"),
    [("rocm", "AMD Instinct MI300X"), ("gfx90a", "AMD Instinct MI250X"), ("gaudi2", "Intel Gaudi 2")],
)
def test_what_is_not_there_is_no_cpu(name, device):
    machine = fingerprint(resolve(name))
    assert (machine.device, machine.driver, machine.core_mhz) == (device, "", 0)
    assert machine.cores == {"rocm": 304, "gfx90a": 110, "gaudi2": 24}[name]


def test_a_gpu_that_is_not_there_matches_by_architecture(database):
    target = resolve("cuda")
    here = replace(fingerprint(target), driver="", device="", core_mhz=0, memory_mhz=0)
    choice = choose(CALL, target)
    other = next(c for c in choice.family.space(CALL, target) if c != choice.variants[0].config)
    tokens = token_ranges(choice.variants, choice.vendor)[0]
    there = replace(here, driver="580.82", device="NVIDIA H200")
    made = record(workload_of(CALL, choice.layouts, tokens), there)
    commit(database, [replace(made, schedule=Schedule.of_family(choice.family.name, other))])
    first = choose(CALL, target, tuned=TunedKernels(database, here)).variants[0]
    assert (first.config, first.record["match"], first.record["changed"]) == (other, "architecture", [])


def test_the_manifest_names_the_record_and_explain_tells_of_it(tiny, tmp_path, capsys):
    target, path = resolve("cpu"), tmp_path / "tuning.db"
    plain = json.loads((compile(tiny, out=tmp_path / "plain").artifact / "manifest.json").read_text())["kernels"]
    assert all(kernel["record"] is None for kernel in plain)
    kernel = next(k for k in plain if k["op"] == "linear" and "residual" not in k["inputs"])
    *_, K, dtype = kernel["inputs"]["x"]
    call = linear_call(int(kernel["inputs"]["weight"][0]), int(K), dtype)
    choice = choose(call, target)
    default = choice.variants[0].config
    other = next(c for c in choice.family.space(call, target) if c["rows"] == 1 and c != default)
    with open_database(path) as database:
        key = tune(database, call, target, 0, other)
    done = compile_model(tiny, out=tmp_path / "tuned", options=CompileOptions(db=str(path)))
    assert done.verdict["outcome"] == "pass"
    tuned = json.loads((done.artifact / "manifest.json").read_text())["kernels"]
    ours = [k for k in tuned if k["record"] is not None]
    assert [(k["config"], k["record"]["id"]) for k in ours] == [(other, key)]
    capsys.readouterr()
    assert main(["db", "--db", str(path), "--json", "explain", str(done.artifact)]) == 0
    said = capsys.readouterr()
    answers = json.loads(said.out)
    assert [a["record"]["id"] for a in answers if a["record"]] == [key]
    words = " ".join(said.err.split())
    assert "measured on" in words
    assert "(alpha) by a tester on 2025-06-15 at 0123abc: 10.0 µs, 2500 GB/s, 70% of roofline" in words
    assert "by its own rules, not from a database" in words


def test_compile_refuses_a_database_that_is_not_there(tiny, tmp_path):
    with pytest.raises(DatabaseError, match="no tuning database here"):
        compile_model(tiny, out=tmp_path / "a", options=CompileOptions(db=str(tmp_path / "tuning.db")))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_verdict_never_gets_as_far(database):
    with pytest.raises(DatabaseError):
        commit(database, [record(verdict=Verdict(1.0, 0.1, "device"))])
