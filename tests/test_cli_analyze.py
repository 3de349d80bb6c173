"""`vllm-compile analyze`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import models
from vllm_compile.cli import main
from vllm_compile.quantities import binary, count, duration

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A model directory with a config.json alone."""
    directory = tmp_path_factory.mktemp("model") / "small-llama"
    models.config(hidden_size=256, intermediate_size=512, dtype="bfloat16").save_pretrained(directory)
    return directory


@pytest.fixture
def refused(capsys):
    """`refused(message, *arguments)`: the command ends with this error in one line, and code 2."""

    def check(message: str, *arguments: object) -> None:
        assert main(["analyze", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert message in err
        assert len(err.strip().splitlines()) == 1

    return check


def test_script(config, tmp_path):
    """As in the README: tables for people on stderr, one line of JSON on stdout, a page."""
    page = tmp_path / "report.html"
    arguments = [
        "--model",
        config,
        "--target",
        "cuda",
        "--batch",
        "1,64",
        "--context",
        "16,64",
        "--html",
        page,
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "scripts/analyze.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    steps = [(step["phase"], step["batch"], step["context"]) for step in report["steps"]]
    assert steps == [(phase, b, c) for phase in ("decode", "prefill") for c in (16, 64) for b in (1, 64)]
    assert report["chip"]["name"] == "NVIDIA H200"
    assert report["warnings"] == []
    for text in ("small-llama", "2 attention, 2 feed-forward", "lossless packing", "KV tiling", "down_proj"):
        assert text in done.stderr
    assert page.read_text().startswith("<!doctype html>")


def test_a_configuration_file_of_any_name(config, tmp_path, capsys):
    file = tmp_path / "another.json"
    file.write_text((config / "config.json").read_text())
    assert main(["analyze", "--model", str(file), "--target", "cuda", "--chip", "h100", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["name"] == "another"
    assert report["chip"]["name"] == "NVIDIA H100 SXM"


def test_this_cpu(config, tmp_path, capsys):
    page = tmp_path / "report.html"
    arguments = ["--batch", "1", "--context", "16", "--json", "--html", str(page)]
    assert main(["analyze", "--model", str(config), *arguments]) == 0
    chip = json.loads(capsys.readouterr().out)["chip"]
    assert "library, plain" not in page.read_text(), "no library takes part"
    assert 1e9 < chip["bandwidth"] < 1e12
    assert 1e9 < chip["matrix"]["bfloat16"] < 1e14
    assert 0 < chip["launch"] < 1e-2


class TestRefused:
    def test_models(self, refused, tmp_path):
        refused("no such model directory", "--model", tmp_path / "absent")
        (tmp_path / "config.json").write_text("{")
        refused("config.json: not JSON", "--model", tmp_path)
        refused("config.json: not JSON", "--model", tmp_path / "config.json")
        (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViT"]}')
        refused("architecture ViT is not a causal language model", "--model", tmp_path)

    def test_targets(self, refused, config):
        refused("unknown target 'tpu'", "--model", config, "--target", "tpu")
        refused("has no chip 'h300'; it has: h200, h100", "--model", config, "--target", "cuda", "--chip", "h300")
        refused(
            "gfx942 has no chip 'mi355x'; it has: mi300x", "--model", config, "--target", "rocm", "--chip", "mi355x"
        )
        refused("has no chip 'h200'; its only one is this machine's", "--model", config, "--chip", "h200")

    def test_a_page_that_cannot_be_written(self, config, tmp_path, capsys):
        page = tmp_path / "absent" / "report.html"
        assert main(["analyze", "--model", str(config), "--target", "cuda", "--html", str(page)]) == 2
        assert "report.html: cannot be written (No such file or directory)" in capsys.readouterr().err

    @pytest.mark.parametrize("batch", ["0", "1,-2", "many", ""])
    def test_sizes(self, config, batch, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["analyze", "--model", str(config), f"--batch={batch}"])
        assert caught.value.code == 2
        assert "--batch" in capsys.readouterr().err


def test_quantities():
    assert [count(n) for n in (0, 999, 1000, 8.03e9, 9.999e8, 1.4e18)] == ["0", "999", "1 k", "8.03 G", "1 G", "1.4 E"]
    assert [binary(n) for n in (0, 64 << 10, 15 << 30, -(256 << 10))] == ["0 B", "64 KiB", "15 GiB", "-256 KiB"]
    assert [duration(s) for s in (0, 2.4e-6, 4.258e-3, 30, 1545)] == ["0 ns", "2.4 µs", "4.26 ms", "30 s", "1,545 s"]
