"""Bucket files: written, read and pruned, and what is said of damaged ones."""

from __future__ import annotations

import json
import os

import pytest

from tests.bucketing.test_plan import TRACES
from vllm_compile.bucketing.trace import Request, write_trace
from vllm_compile.cli import main
from vllm_compile.errors import BucketError
from vllm_compile.runtime.buckets import Bucket, BucketPlan, Limits, Work, read_buckets

PLAN = BucketPlan((Bucket(1, 1, 4), Bucket(1, 64, 0), Bucket(4, 1, 16)), Work(2.5, 1.0), 128)


def test_written_and_read(tmp_path):
    PLAN.write(tmp_path / "b.json")
    assert read_buckets(tmp_path / "b.json") == PLAN


@pytest.mark.parametrize("write", [PLAN.write, lambda path: write_trace(path, "nothing", [])], ids=["buckets", "trace"])
def test_a_full_disk_leaves_the_old_file(write, tmp_path, monkeypatch):
    path = tmp_path / "b.json"
    path.write_text("old")

    def half(self, text):
        self.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", half)
    with pytest.raises(BucketError, match=r"b\.json: cannot be written \(No space left on device"):
        write(path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("b.json", "old")]


def test_a_pipe_is_written_to_and_a_mode_is_kept(tmp_path):
    """What is no file, /dev/null for one, is not replaced by one."""
    pipe, path = tmp_path / "pipe", tmp_path / "b.json"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    PLAN.write(pipe)
    assert pipe.is_fifo()
    assert b'"buckets"' in os.read(end, 1 << 16)
    os.close(end)
    path.touch(mode=0o640)
    PLAN.write(path)
    assert path.stat().st_mode & 0o777 == 0o640


def test_the_largest_buckets_are_no_larger_than_the_cache():
    assert Limits(4, 64, 4096, 32, cache_blocks=30).largest == (Bucket(4, 1, 30), Bucket(1, 64, 30))


def test_the_cheapest_cover():
    plan = BucketPlan((Bucket(2, 1, 50), Bucket(3, 1, 4)), Work(1.0, 1.0), 128)
    assert plan.find(Bucket(2, 1, 4)) == Bucket(3, 1, 4)
    assert plan.find(Bucket(2, 1, 5)) == Bucket(2, 1, 50)
    assert plan.find(Bucket(1, 2, 1)) is None, "a prompt is not run by a graph of decodes"


def test_pruned():
    """Of decodes and of prompts the largest are kept."""
    assert PLAN.prune({Bucket(1, 1, 4)}) == PLAN
    assert PLAN.prune({Bucket(9, 1, 9)}).buckets == (Bucket(1, 64, 0), Bucket(4, 1, 16))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema": 9}, "not a bucket file of schema 1"),
        ({"work_us": {"token": 1}}, "work_us, block_size or buckets is missing or wrong"),
        ({"buckets": []}, "has no bucket"),
        ({"buckets": [[1, 1, 4], [1, 0, 4]]}, r"bucket 2 is \[1, 0, 4\]; it must be \[batch, queries, blocks\]"),
        ({"buckets": [[1, 1, 4.5]]}, "bucket 1 is"),
        ({"buckets": [[1, 1, True]]}, "bucket 1 is"),
        ({"buckets": [[1, 1]]}, "bucket 1 is"),
        ({"buckets": [7]}, "bucket 1 is 7"),
        ({"buckets": [[1, 1, 4], [1, 1, 4]]}, r"bucket \[1, 1, 4\] is there twice"),
    ],
)
def test_damaged(tmp_path, change, complaint):
    PLAN.write(tmp_path / "b.json")
    good = json.loads((tmp_path / "b.json").read_text())
    (tmp_path / "b.json").write_text(json.dumps(good | change))
    with pytest.raises(BucketError, match=complaint):
        read_buckets(tmp_path / "b.json")


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(BucketError, match=r"none\.json: cannot be read"):
        read_buckets(tmp_path / "none.json")
    (tmp_path / "text").write_text("[")
    with pytest.raises(BucketError, match="not a bucket file"):
        read_buckets(tmp_path / "text")
    with pytest.raises(BucketError, match="cannot be written"):
        PLAN.write(tmp_path / "no" / "b.json")


def test_planned_and_pruned_from_the_command_line(tmp_path, capsys):
    trace = ["--trace", str(TRACES / "describe_odd.json")]
    assert main(["buckets", "plan", *trace, "--budget", "12", "--out", str(tmp_path / "b.json")]) == 0
    planned = read_buckets(tmp_path / "b.json")
    assert 2 <= len(planned.buckets) <= 12
    other = ["--trace", str(tmp_path / "one.json")]
    write_trace(tmp_path / "one.json", "one request", [Request(0, 100, 40)])
    prune = ["buckets", "prune", str(tmp_path / "b.json"), *other, "--out", str(tmp_path / "p.json")]
    assert main([*prune, "--max-num-seqs", "8", "--max-model-len", "256"]) == 0, "smaller limits than the plan's"
    pruned = read_buckets(tmp_path / "p.json")
    assert set(pruned.buckets) < set(planned.buckets)
    assert set(Limits(64, 2048, 4096, 128, 4000).largest) < set(pruned.buckets)
    assert main([*prune, "--block-size", "64"]) == 2
    assert "for KV blocks of 128 tokens, not 64: pass --block-size 128" in capsys.readouterr().err
    assert main(["buckets", "plan", "--trace", "none", "--budget", "12", "--out", str(tmp_path / "x.json")]) == 2
    assert "none: cannot be read" in capsys.readouterr().err


def test_traces_of_one_name_are_compared(tmp_path, capsys):
    paths = [tmp_path / name / "trace.json" for name in ("one", "two")]
    for path, request in zip(paths, (Request(0, 100, 40), Request(0, 300, 2)), strict=True):
        path.parent.mkdir()
        write_trace(path, "one request", [request])
    assert main(["buckets", "compare", "--trace", str(paths[0]), "--held-out", str(paths[1]), "--budget", "4"]) == 0
    head, _, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split(" | ")[2:] == [
        f"{paths[0]}: work, tokens, blocks",
        f"{paths[1]} (held out): work, tokens, blocks |",
    ]
    *_, one, two = first.strip("| ").split(" | ")
    assert one != two
