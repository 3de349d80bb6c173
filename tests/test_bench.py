"""The benchmark on a small model: every peer runs, and the figures are those of what was timed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import psutil
import pytest

from vllm_compile import bench as benchmark
from vllm_compile import bench_engine
from vllm_compile.bench import DECODE_STEPS, GPU_SHARE, Engine, bench
from vllm_compile.bench_workloads import Workload, served_lengths, step_bytes
from vllm_compile.cli import main
from vllm_compile.errors import VllmCompileError
from vllm_compile.runtime.program import load


@pytest.mark.slow
def test_figures(trained_llama, compiled_fp32, capsys, monkeypatch):
    workers = []

    class Remembered(Engine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            workers.append(self._process.pid)

    monkeypatch.setattr(benchmark, "Engine", Remembered)
    command = ["bench", str(compiled_fp32), "--model", str(trained_llama), "--against", "vllm-eager,hf"]
    assert main([*command, "--batch", "2", "--repeats", "1", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["engine"], row["workload"]): row for row in figures["rows"]}
    assert set(rows) == {(e, w) for e in ("compiled", "vllm-eager", "hf") for w in ("decode", "prefill")}
    read = step_bytes(load(compiled_fp32).plan, [128 + 3 * DECODE_STEPS["cpu"] // 2] * 2)
    for (engine, workload), row in rows.items():
        tokens = 2 if workload == "decode" else row["length"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["milliseconds"] * 1e3)
        ratio = row["milliseconds"] / rows["compiled", workload]["milliseconds"]
        assert row["speedup"] == pytest.approx(ratio), engine
        if workload == "decode":
            assert row["gigabytes_per_second"] == pytest.approx(read / row["milliseconds"] / 1e6)
    assert len(workers) == 3
    deadline = time.monotonic() + 60
    while left := living(workers):  # what is killed takes a moment to die
        assert time.monotonic() < deadline, f"engines compute in children: {left}"
        time.sleep(0.05)


def living(sessions: list[int]) -> list[int]:
    """Processes of these sessions that are no zombies."""
    found = []
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError):  # others come and go
            if os.getsid(process.pid) in sessions and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@pytest.mark.parametrize("seconds", [0, 1.5, 60])
def test_an_engine_rests(seconds, monkeypatch):
    """It is waited for as long as a process that it has started computes, but not forever."""
    monkeypatch.setattr(bench_engine, "LONGEST_REST", 3)
    busy = f"import time; end = time.monotonic() + {seconds}; print(flush=True)\n"
    busy += "while time.monotonic() < end: pass\ntime.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    engine = object.__new__(Engine)
    engine._process = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True, stdout=subprocess.PIPE)
    try:
        assert engine._process.stdout.readline() == b"\n", "it computes now, or rests"
        began = time.monotonic()
        engine.rest()
        took = time.monotonic() - began
    finally:
        os.killpg(engine._process.pid, signal.SIGKILL)
        engine._process.wait()
    assert min(seconds, 3) - 0.5 < took < min(seconds, 3) + 1.5


def test_more_steps_than_positions(compiled_fp32, trained_llama):
    most = load(compiled_fp32, weights=False).max_positions // 2
    with pytest.raises(VllmCompileError, match=rf"{2 * most} positions, too few for --steps {most}"):
        bench(compiled_fp32, trained_llama, ["vllm"], [Workload(1, 8)], [], repeats=1, steps=most)


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("--steps", "0"),
        ("--batch", "0"),
        ("--context", "0"),
        ("--repeats", "0"),
        ("--decode", "0x8"),
        ("--decode", "4x8+0x8"),
        ("--prefill", "4x0"),
        ("--serve", "0x8"),
    ],
)
def test_none_of_anything(compiled_fp32, option, given, capsys):
    with pytest.raises(SystemExit):
        main(["bench", str(compiled_fp32), option, given])
    assert f"{option}: '0' is no number from 1 on" in capsys.readouterr().err


def test_unknown_peer(compiled_fp32):
    with pytest.raises(SystemExit):
        main(["bench", str(compiled_fp32), "--against", "llama.cpp"])


def test_an_engine_that_does_not_start(tmp_path, monkeypatch):
    """Its log is kept, and nothing of it lives on."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VllmCompileError, match=r"engine vllm ended; why is in bench-vllm\.log"):
        Engine("vllm", tmp_path / "nowhere", {}, tmp_path / "log")
    assert "nowhere" in (tmp_path / "bench-vllm.log").read_text()


def test_an_engine_alone_has_the_gpu_to_itself(compiled_fp32, monkeypatch):
    plan = load(compiled_fp32, weights=False).plan
    monkeypatch.setattr(benchmark.gpu, "detect", lambda: SimpleNamespace(memory_bytes=80 << 30))
    both = benchmark._memory(("compiled", "vllm"), plan, "cuda")
    assert sum(options["gpu_memory_utilization"] for options in both.values()) == pytest.approx(GPU_SHARE, abs=0.002)
    for name in ("compiled", "vllm"):
        assert benchmark._memory((name,), plan, "cuda") == {name: {"gpu_memory_utilization": GPU_SHARE}}


ADMISSION = 0.25  # seconds that requests take once, however many tokens they generate
made = []


class FakeEngine:
    """Stands for a worker process: remembers what it is asked for, and how many others live.

    The third and fourth that are started are twice as slow as the first two, the next ones three times.
    """

    living = 0
    patience = None  # how often all of them together answer before Ctrl+C is pressed

    def __init__(self, name, model, options, log):
        self.name, self.load_seconds, self.first_token_seconds = name, 0.0, 0.0
        self.asked, self.options, self.pace = [], options, 1 + len(made) // 2
        self.asked_at_rest = []  # how much it had been asked each time it was waited for
        FakeEngine.living += 1
        self.others = FakeEngine.living - 1
        made.append(self)

    def seconds(self, prompts, new_tokens):
        self.asked.append((prompts, new_tokens))
        if self.patience is not None and sum(len(engine.asked) for engine in made) > self.patience:
            raise KeyboardInterrupt
        return (ADMISSION + max(new_tokens)) * self.pace

    def rest(self):
        self.asked_at_rest.append(len(self.asked))

    def close(self):
        FakeEngine.living -= 1


@pytest.fixture
def fakes(monkeypatch):
    """The engines that a bench makes, none of which computes."""
    made.clear()
    monkeypatch.setattr(benchmark, "Engine", FakeEngine)
    return made


@pytest.mark.parametrize(("alone", "steps"), [(False, None), (True, None), (False, 5)])
def test_what_engines_are_asked_for(trained_llama, compiled_fp32, fakes, alone, steps):
    workloads = [Workload(2, 32)]
    figures = bench(compiled_fp32, trained_llama, ["vllm"], workloads, workloads, repeats=1, alone=alone, steps=steps)
    decode, prefill = (next(row for row in figures["rows"] if row.workload == kind) for kind in ("decode", "prefill"))
    assert decode.milliseconds == pytest.approx(1e3), "of a step, without what comes once"
    assert prefill.milliseconds == pytest.approx(1e3 * (1 + ADMISSION))
    assert [engine.others for engine in fakes] == [0, 0 if alone else 1]
    n = steps or DECODE_STEPS["cpu"]
    for engine in fakes:
        assert engine.options["max_model_len"] == 32 + 2 * n + 1
        rounds = [engine.asked[:3], engine.asked[3:6]]  # of the decode; one warms up
        for asked in rounds:
            assert [tokens for _, tokens in asked] == [[1, 1], [1 + n] * 2, [1 + 2 * n] * 2]
            assert all(prompts == asked[0][0] for prompts, _ in asked)  # the prefix cache has them from the first on
        seen = [tuple(map(tuple, prompts)) for prompts, _ in (rounds[0][0], rounds[1][0], *engine.asked[6:])]
        assert len(seen) == len(set(seen)) == 4  # a prefill never finds its prompts in the cache
    # Before the turns of one, the other is waited for.
    assert [engine.asked_at_rest for engine in fakes] == ([[], []] if alone else [[3, 6, 7, 8], [0, 3, 6, 7]])


def test_requests_of_several_lengths(trained_llama, compiled_fp32, fakes, capsys):
    """They are decoded together; each of their tokens is read."""
    command = ["bench", str(compiled_fp32), "--model", str(trained_llama), "--batch", "1", "--context", "8"]
    assert main([*command, "--decode", "2x20+1x90,3x8", "--prefill", "1x8+2x9", "--repeats", "1", "--json"]) == 0
    printed = capsys.readouterr()
    doing = ["starting compiled", "starting vllm"]
    doing += ["decode, 1x8", "decode, 2x20+1x90", "decode, 3x8", "prefill, 1x8+2x9"]
    assert [line for line in printed.err.splitlines() if line in doing] == doing, "said where there is no terminal, too"
    assert "compiled" in next(line for line in printed.err.splitlines() if "2x20+1x90" in line and "│" in line)
    figures = json.loads(printed.out.splitlines()[-1])
    rows = {(row["workload"], row["requests"]): row for row in figures["rows"] if row["engine"] == "compiled"}
    assert list(rows) == [("decode", "1x8"), ("decode", "2x20+1x90"), ("decode", "3x8"), ("prefill", "1x8+2x9")]
    row, n = rows["decode", "2x20+1x90"], DECODE_STEPS["cpu"]
    assert (row["batch"], row["length"], row["tokens_per_second"]) == (3, 90, pytest.approx(3))
    read = step_bytes(load(compiled_fp32, weights=False).plan, [20 + 3 * n // 2] * 2 + [90 + 3 * n // 2])
    assert row["gigabytes_per_second"] == pytest.approx(read / 1e9)
    assert rows["prefill", "1x8+2x9"]["tokens_per_second"] == pytest.approx((8 + 2 * 9) / (1 + ADMISSION))
    for engine in fakes:
        assert engine.options["max_num_seqs"] == 3
        assert engine.options["max_model_len"] == 90 + 2 * n + 1
        asked = {tuple(len(prompt) for prompt in prompts) for prompts, _ in engine.asked}
        assert asked == {(8,), (20, 20, 90), (8, 8, 8), (8, 9, 9)}


def test_hugging_face_runs_one_length(compiled_fp32, trained_llama):
    mixed = Workload.of([(1, 8), (1, 9)])
    with pytest.raises(VllmCompileError, match="leave it out of --against, or those of several"):
        bench(compiled_fp32, trained_llama, ["hf"], [mixed], [Workload(1, 8)], repeats=1)


def test_a_load_that_is_served(trained_llama, compiled_fp32, fakes):
    """Requests of the same lengths in each round, none of whose prompts has been seen; the tokens of answers count."""
    served, most = Workload(20, 50), Workload(4, 8)
    figures = bench(compiled_fp32, trained_llama, ["vllm"], [], [most], repeats=2, serves=[served])
    row = next(row for row in figures["rows"] if row.workload == "serve")
    prompt_lengths, answers = served_lengths(served)
    assert {1 <= length <= 50 for length in (*prompt_lengths, *answers)} == {True}
    assert len(set(prompt_lengths)) > 5
    assert prompt_lengths != answers
    assert row.milliseconds == pytest.approx(1e3 * (ADMISSION + max(answers)))
    assert row.tokens_per_second == pytest.approx(sum(answers) / (ADMISSION + max(answers)))
    assert row.gigabytes_per_second == 0
    for engine in fakes:
        assert engine.options["max_num_seqs"] == most.batch, "more requests than run at a time"
        assert engine.options["max_model_len"] > 2 * 50
        asked = engine.asked[-3:]  # one warms up
        assert [tokens for _, tokens in asked] == [answers] * 3
        assert [[len(prompt) for prompt in prompts] for prompts, _ in asked] == [prompt_lengths] * 3
        assert len({str(prompts) for prompts, _ in asked}) == 3


def test_a_load_is_cut_to_the_model(trained_llama, compiled_fp32, fakes):
    positions = load(compiled_fp32, weights=False).max_positions
    figures = bench(compiled_fp32, trained_llama, ["vllm"], [], [Workload(1, 8)], 1, serves=[Workload(3, positions)])
    assert next(row.length for row in figures["rows"] if row.workload == "serve") == positions // 2
    assert {engine.options["max_model_len"] for engine in fakes} == {positions}


def test_hugging_face_serves_nothing(compiled_fp32, trained_llama):
    with pytest.raises(VllmCompileError, match="leave it out of --against, or leave out --serve"):
        bench(compiled_fp32, trained_llama, ["hf"], [], [Workload(1, 8)], repeats=1, serves=[Workload(3, 8)])


def test_engines_alone_take_turns(trained_llama, compiled_fp32, fakes, monkeypatch):
    """So a machine that gets slower does so for all of them; it does not where one engine does all its rounds first."""

    def compared():
        fakes.clear()
        return bench(compiled_fp32, trained_llama, ["vllm"], [Workload(2, 32)], [], repeats=3, alone=True)

    figures = compared()
    assert (figures["rounds"], figures["interrupted"]) == (3, False)
    assert [engine.name for engine in fakes] == 3 * ["compiled", "vllm"]
    assert figures["load_seconds"] == {name: [0.0] * 3 for name in ("compiled", "vllm")}
    rows = {row.engine: row for row in figures["rows"]}
    assert (rows["vllm"].speedup, rows["vllm"].milliseconds) == (1.0, pytest.approx(2e3))
    assert rows["vllm"].quartiles == pytest.approx((1.5e3, 2.5e3))
    ours, theirs = ([engine.asked for engine in fakes if engine.name == name] for name in ("compiled", "vllm"))
    assert ours == theirs
    assert len({str(prompts) for asked in ours for prompts, _ in asked[3:]}) == 3, "prompts of its own for each round"

    turns = benchmark._turns
    monkeypatch.setattr(benchmark, "_turns", lambda *given: sorted(turns(*given)))
    assert {row.engine: row.speedup for row in compared()["rows"]}["vllm"] != 1.0


@pytest.mark.parametrize(
    ("alone", "patience", "rounds"),
    [(False, 6 * 3 + 5, 2), (False, 24 + 3, 3), (True, 5 * 8 + 4, 2), (False, 6 + 5, None), (True, 6 + 5, None)],
)
def test_interrupted(trained_llama, compiled_fp32, fakes, monkeypatch, alone, patience, rounds):
    """What all engines have done by then counts, and nothing else.

    A decode asks an engine three times, a prefill once; before the first round, one warms up.
    """
    monkeypatch.setattr(FakeEngine, "patience", patience)
    timed = Workload(2, 32), Workload(3, 32)

    def run():
        return bench(compiled_fp32, trained_llama, ["vllm"], timed[:1], timed[1:], repeats=3, alone=alone)

    if rounds is None:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        figures = run()
        assert (figures["rounds"], figures["interrupted"]) == (rounds, True)
        decodes = [row for row in figures["rows"] if row.workload == "decode"]
        assert [row.engine for row in decodes] == ["compiled", "vllm"]
    assert FakeEngine.living == 0, "engines are ended all the same"


def test_quartiles():
    assert benchmark._quartiles([5.0]) == (5.0, 5.0)
    assert benchmark._quartiles([9.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 4.0)
