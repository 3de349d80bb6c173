"""Boards over TVM's RPC: its own tracker and server, on this machine."""

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer

import pytest
import torch
from tvm import rpc
from tvm.rpc.server import Server
from tvm.rpc.tracker import Tracker

from vllm_compile.cli import main
from vllm_compile.driver import lower_model
from vllm_compile.errors import TargetError
from vllm_compile.schedules.database import open_database
from vllm_compile.schedules.database.executors import TaskCrashedError, TaskFailedError
from vllm_compile.schedules.database.machine import fingerprint
from vllm_compile.schedules.database.store import select_where
from vllm_compile.schedules.database.tasks import Lease, all_tasks
from vllm_compile.schedules.tuning import inputs, rpc_executor
from vllm_compile.schedules.tuning.extract import tasks_of
from vllm_compile.schedules.tuning.prepare import prepare
from vllm_compile.schedules.tuning.rpc_executor import RpcExecutor
from vllm_compile.schedules.tuning.search import Progress, pending, submit
from vllm_compile.schedules.tuning.task import ESTIMATE, MEASURE
from vllm_compile.targets import resolve

CPU = resolve("cpu")
HERE = "127.0.0.1"


@pytest.fixture(scope="module")
def tracker():
    """With one board; a server takes seconds to start and to register, on a busy machine more."""
    tracker = Tracker(HERE, port=9190, port_end=9290, silent=True)
    server = serve(tracker.port, "slate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rpc_executor, "PATIENCE_SECONDS", 300.0)
        yield tracker.port
    server.terminate()
    tracker.terminate()


def serve(tracker, key):
    return Server(HERE, port=9090, port_end=9189, is_proxy=False, tracker_addr=(HERE, tracker), key=key, silent=True)


@pytest.fixture(scope="module")
def task(tiny):
    tasks = tasks_of(lower_model(tiny, CPU), CPU, trials=2)
    found = next(task for task in tasks if "model_mlp_down_proj_weight" in task.names)
    return replace(found, ranges=found.ranges[1:2])


@pytest.fixture
def built(task, monkeypatch, tmp_path):
    """Candidates are built in this process; `spoil`, if one sets it, then does something to the case."""
    spoil = []

    def build(payload, folder):
        prepare(payload, folder)
        for change in spoil:
            change(folder)

    monkeypatch.setattr(rpc_executor, "build", build)
    monkeypatch.setattr(rpc_executor, "COLD_BYTES", 1 << 20)
    return spoil


def test_a_worker_measures_on_a_board(tracker, task, built, tmp_path, capsys):
    """From the queue to a record that names the board; that nothing protects it is said first."""
    url = str(tmp_path / "tuning.db")
    board, here = fingerprint(CPU, "slate"), fingerprint(CPU)
    with open_database(url) as database:
        for machine in (here, replace(board, device="another"), board):
            assert submit(database, [Progress(task)], machine) == 1
    where = ["--executor", "tvm-rpc", "--tracker", f"{HERE}:{tracker}", "--board", "slate", "--gb-per-s", "20"]
    assert main(["worker", "--db", url, *where, "--until-empty", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out.splitlines()[-1]) == {"completed": 1, "failed": 0, "lost": 0}, told.err
    assert "neither encrypted nor authenticated" in " ".join(told.err.split())
    with open_database(url, writable=False) as database:
        ((record, _),) = select_where(database)
        assert [t.state for t in all_tasks(database)] == ["queued", "queued", "done"], "others' are left alone"
        assert [t.attempts for t in all_tasks(database)] == [0, 0, 1]
        (known,) = pending(database, [task], board)
        (unknown,) = pending(database, [task], here)
    assert (known.state, unknown.state) == ("known", "waiting")
    assert record.target == board
    assert (record.target.device, record.target.cores, record.target.arch) == ("slate", 0, fingerprint(CPU).arch)
    assert record.workload == task.ranges[0].workload
    assert record.schedule.content()["config"] in task.ranges[0].configs
    assert record.verdict.error <= 1
    assert record.verdict.executed_on == "slate"
    assert record.roofline_share == pytest.approx(record.gb_per_s / 20)


def test_a_task_for_another_machine_is_refused(tracker, task, built):
    """The queue does not offer any; one that is handed over all the same is not measured."""
    with pytest.raises(TargetError, match="for another machine"):
        on_board(tracker, task, machine=fingerprint(CPU))


def on_board(tracker, task, key="slate", machine=None):
    payload = task.payload() | ({} if machine is None else {"machine": machine.text})
    return RpcExecutor(HERE, tracker, key, 20.0, 600.0).run(Lease(0, MEASURE, payload, 0, 1), Event())


def test_a_wrong_result_is_seen_here(tracker, task, built, monkeypatch):
    """The board computes; what is right is known on this side."""
    right = inputs.REFERENCES["linear"]
    monkeypatch.setitem(inputs.REFERENCES, "linear", lambda *args, **kwargs: torch.roll(right(*args, **kwargs), 1))
    with pytest.raises(TaskFailedError, match="is wrong"):
        on_board(tracker, task)


def test_what_ends_the_boards_server_is_a_crash(tracker, task, built):
    """A server of TVM's in Python does not survive it: it is this test's own."""

    def deadly(folder: Path):
        source = folder / "deadly.c"
        symbols = json.loads((folder / "case.json").read_text())["configs"]
        source.write_text(
            "#include <stdlib.h>\n#include <stdint.h>\n"
            + "".join(f"int __tvm_ffi_{s}(void *a, void *b, int32_t n, void *c) {{ abort(); }}\n" for s in symbols)
        )
        subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", folder / "kernels.so"], check=True)

    built.append(deadly)
    server = serve(tracker, "slab")
    try:
        with pytest.raises(TaskCrashedError, match="slab answers no more"):
            on_board(tracker, task, "slab")
    finally:
        server.terminate()


def test_a_board_that_is_started_again_is_waited_for(tracker, task, built):
    """After a candidate that ended its server, the next task comes before the board is back."""
    servers = []
    later = Timer(1.0, lambda: servers.append(serve(tracker, "flint")))
    later.start()
    try:
        on_board(tracker, task, "flint")
    finally:
        later.join()
        servers[0].terminate()


def test_a_board_that_goes_while_candidates_are_built(tracker, task, built, monkeypatch):
    """The tracker would let us wait for ever."""
    session, server = rpc.connect_tracker(HERE, tracker), serve(tracker, "chalk")

    def wait_until(there):
        while ("chalk" in rpc_executor._boards(session)) != there:
            time.sleep(0.05)

    def go(folder):
        server.terminate()
        wait_until(False)

    wait_until(True)
    built.append(go)
    monkeypatch.setattr(rpc_executor, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(TaskFailedError, match="no board chalk"):
        on_board(tracker, task, "chalk")


def test_a_board_that_nobody_has(tracker, task, monkeypatch):
    while "slate" not in rpc_executor._boards(rpc.connect_tracker(HERE, tracker)):
        time.sleep(0.05)
    monkeypatch.setattr(rpc_executor, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(TaskFailedError, match=r"no board salte; there are: .*slate"):
        on_board(tracker, task, "salte")


def test_no_tracker_and_no_such_task(task, capfd, tmp_path):
    executor = RpcExecutor(HERE, 9, "slate", 20.0, 60.0)
    with pytest.raises(TaskFailedError):
        executor.run(Lease(0, MEASURE, task.payload(), 0, 1), Event())
    with pytest.raises(TaskFailedError, match="kind measure"):
        executor.run(Lease(0, ESTIMATE, task.payload(), 0, 1), Event())
    url = str(tmp_path / "tuning.db")
    assert main(["worker", "--db", url, "--executor", "tvm-rpc", "--board", "slate"]) == 2
    assert "needs --tracker, --gb-per-s" in " ".join(capfd.readouterr().err.split())
