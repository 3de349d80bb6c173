"""The table of tuned CUDA kernels: which kernels it times, on which tensors, and what it says.  No GPU is needed."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.schedules.database.samples import H200, record
from vllm_compile.errors import DatabaseError
from vllm_compile.lossless import unpack
from vllm_compile.schedules.cuda.linear import Linear
from vllm_compile.schedules.database import Workload, commit, open_database
from vllm_compile.schedules.tuning.task import MEASURE_BUILT, Range, Task
from vllm_compile.targets import resolve

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import kernels_cuda_linear
import tuned_cuda_linear

TARGET, FAMILY = resolve("h200"), Linear(packed=True)
N, K = 128, 64
CALL = kernels_cuda_linear.spec_of("linear", N, K, residual=True)


@pytest.fixture
def task():
    """The first two ranges of a call, each with three configurations."""
    ranges = []
    for least, most in ((1, 8), (9, 16)):
        configs = FAMILY.candidates(CALL, least, TARGET)[:3]
        layouts = {name: layout.name for name, layout in FAMILY.layouts(CALL, TARGET).items()}
        ranges.append(Range(Workload.of_call(CALL, layouts, (least, most)), most, tuple(configs)))
    return Task(MEASURE_BUILT, FAMILY.name, "h200", ("o_proj",), 1, N * K * 2, tuple(ranges))


class FakeKernels:
    """Kernels that keep what they are called with; a graph is the symbols that it calls, none of cuBLASLt's."""

    def __init__(self, task):
        self.configs = {f"k{i}": config for i, config in enumerate(c for r in task.ranges for c in r.configs)}
        self.called = []

    def bound(self, symbol, tensors):
        x, weight, residual, y = tensors
        assert unpack(weight, N, K).shape == (N, K)
        assert x.shape == (y.shape[0], K)
        assert residual.shape == y.shape == (len(x), N)
        return lambda: self.called.append((symbol, len(x)))

    def graph(self, run):
        self.called.clear()
        run()
        return list(self.called)


@pytest.fixture
def timed(task, tmp_path, monkeypatch):
    """A database in which the third configuration won the first range, the default the second; and a clock."""
    for module in (kernels_cuda_linear, tuned_cuda_linear):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(kernels_cuda_linear, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(tuned_cuda_linear, "GRAPH_CALLS", 16)
    graphs = []

    def median_us(found):
        graphs.append(found)
        return [16.0 * (40, 20, 10)[i] for i in range(len(found))]

    monkeypatch.setattr(tuned_cuda_linear, "median_us", median_us)
    url = str(tmp_path / "tuning.db")
    with open_database(url) as database:
        for wanted, best in zip(task.ranges, (2, 0), strict=True):
            commit(database, [record(wanted.workload, config=wanted.configs[best], family=FAMILY.name)])
    return url, graphs


def test_a_row_for_each_range(task, timed):
    """Where the tuned configuration is the hand-picked one it is timed once; where cuBLASLt serves, that alone is."""
    url, graphs = timed
    with open_database(url, writable=False) as database:
        found = list(tuned_cuda_linear.rows(task, FakeKernels(task), database, H200, bandwidth=1e-4))
    assert [{call[0] for graph in turn for call in graph} for turn in graphs] == [{"k0", "k2"}, {"k3"}, set(), set()]
    assert [{call[1] for graph in turn for call in graph} for turn in graphs[:2]] == [{8}, {16}]
    assert all(len(graph) >= 16 for turn in graphs[:2] for graph in turn[1:])
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row, _ in found]
    assert [len(row) for row in cells] == [len(tuned_cuda_linear.HEAD)] * 4
    stored = FAMILY.layouts(CALL, TARGET)["weight"].shape((N, K))[0]
    copies = -(-(1 << 16) // stored)
    us = 16 / (copies * -(-16 // copies))
    assert cells[0][:6] == [
        "o_proj: linear + residual",
        f"{N} x {K}",
        "1-8",
        f"{40 * us:.1f}",
        f"{20 * us:.1f}",
        f"{10 * us:.1f}",
    ]
    assert cells[0][6:8] == ["2.00", "4.00"]
    assert cells[0][8] == f"0.00 ({100 * stored / (10 * us) / 1e6 / 1e-4:.0f} %)"
    assert stored / (10 * us) > 1, "a share that is not rounded to nothing"
    assert cells[1][2] == "9-16"
    assert cells[1][4] == cells[1][5]
    assert [row[2:5] for row in cells[2:]] == [[t, f"{40 * us:.1f}", "cuBLASLt"] for t in ("17-32", "33-64")]
    assert [list(gains.values()) for _, gains in found] == [[2.0, 4.0], [1.0, 2.0], [], []]


def test_what_was_not_measured_here_is_left_empty(task, timed, monkeypatch):
    """Other rows are worth their time; without any it is an error."""
    url, _ = timed
    unknown = replace(task.ranges[0], workload=Workload.of_call(CALL, {}, (1, 8)))
    partly, nothing = replace(task, ranges=(unknown, task.ranges[1])), replace(task, ranges=(unknown,))
    with open_database(url, writable=False) as database:
        found = list(tuned_cuda_linear.rows(partly, FakeKernels(task), database, H200, bandwidth=4.8))
    assert [bool(gains) for _, gains in found] == [False, True, False, False]
    assert [cell.strip() for cell in found[0][0].split("|")[6:-1]] == [""] * 4
    monkeypatch.setattr(tuned_cuda_linear, "built", lambda folder: ([nothing], H200))
    monkeypatch.setattr(tuned_cuda_linear, "BuiltKernels", FakeKernels)
    monkeypatch.setattr(sys, "argv", ["tuned_cuda_linear.py", "candidates", "--db", url])
    with pytest.raises(DatabaseError, match=r"tune --measure"):
        tuned_cuda_linear.main()


def test_the_whole_table(task, timed, monkeypatch, capsys):
    url, _ = timed
    monkeypatch.setattr(tuned_cuda_linear, "built", lambda folder: ([task], H200))
    monkeypatch.setattr(tuned_cuda_linear, "BuiltKernels", FakeKernels)
    monkeypatch.setattr(sys, "argv", ["tuned_cuda_linear.py", "candidates", "--db", url])
    tuned_cuda_linear.main()
    lines = capsys.readouterr().out.splitlines()
    assert H200.device in lines[0]
    assert sum(line.startswith("| o_proj") for line in lines) == 4
    assert lines[-1].endswith("of 2 rows: 1.414x hand-picked, 2.828x cuBLASLt.")
