"""Options of `tune` that contradict each other: one line says which and why, before anything is read."""

import pytest

from vllm_compile.cli import main

NOTHING = ["--model", "no_such_model"]
CUDA = [*NOTHING, "--target", "cuda"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--measure", "x", "--model", "y"], "--measure and --model contradict each other: what is measured"),
        (["--measure", "x", "--target", "cuda"], "--measure and --target"),
        (["--measure", "x", "--target", "no_such_target"], "--measure and --target"),
        (["--measure", "x", "--trials", "8"], "--measure and --trials"),
        (["--measure", "x", "--pack", "none"], "--measure and --pack"),
        (["--measure", "x", "--dtype", "float32"], "--measure and --dtype"),
        (["--measure", "x", "--build", "y"], "--measure and --build contradict each other: one machine builds"),
        (["--measure", "x", "--traces", "8"], "--measure and --traces"),
        (["--measure", "x", "--submit"], "--measure and --submit contradict each other: workers build"),
        (["--measure", "x", "--board", "slate"], "--measure and --board"),
        ([*CUDA, "--build", "x", "--db", "y.db"], "--build and --db contradict each other: candidates are only built"),
        ([*CUDA, "--build", "x", "--budget", "10m"], "--build and --budget"),
        ([*CUDA, "--build", "x", "--submit"], "--build and --submit"),
        ([*CUDA, "--build", "x", "--traces", "8"], "--build and --traces"),
        ([*CUDA, "--traces", "8"], "--target cuda and --traces contradict each other: MetaSchedule searches"),
        ([*CUDA, "--submit", "--board", "slate"], "--target cuda and --board contradict each other: boards are CPUs"),
        ([*NOTHING, "--target", "h100", "--traces", "8"], "--target h100 and --traces"),
        ([*NOTHING, "--build", "x"], "--target cpu and --build contradict each other: a CPU is measured where"),
        ([*NOTHING, "--target", "cpu", "--build", "x"], "--target cpu and --build"),
        ([*NOTHING, "--submit", "--traces", "8"], "--submit and --traces"),
        ([*NOTHING, "--submit", "--budget", "10m"], "--submit and --budget contradict each other: workers go on"),
        ([*NOTHING, "--submit", "--budget", "0"], "--submit and --budget"),
        ([*NOTHING, "--board", "slate"], "--board needs --submit: boards take tasks from the queue"),
        ([*NOTHING, "--target", "rocm", "--submit"], "--target rocm and --submit contradict each other: a model of"),
        ([*NOTHING, "--target", "gfx950", "--build", "x"], "--target gfx950 and --build"),
        ([*NOTHING, "--target", "rocm", "--traces", "8"], "--target rocm and --traces"),
    ],
)
def test_contradictions(options, words, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", *options]) == 2
    said = capfd.readouterr()
    (line,) = said.err.strip().splitlines()
    assert line.startswith(f"error: {words}")
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        [*NOTHING, "--dry-run", "--budget", "10m", "--pack", "none", "--traces", "8", "--trials", "4"],
        [*NOTHING, "--dry-run", "--submit", "--board", "slate"],
        [*NOTHING, "--target", "cuda", "--build", "x", "--trials", "4", "--pack", "none", "--dry-run"],
        [*NOTHING, "--target", "cuda", "--submit", "--dry-run"],
        [*NOTHING, "--target", "rocm", "--budget", "10m", "--dry-run"],
    ],
)
def test_what_goes_together_is_not_refused(options, capfd):
    """The model is looked for, which comes later."""
    assert main(["tune", *options]) == 2
    said = capfd.readouterr().err
    assert "contradict" not in said
    assert "no_such_model" in said
