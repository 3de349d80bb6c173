"""Tasks spread over a real Ray cluster of two nodes, two raylets on this machine."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from threading import Event, Timer

import pytest

from vllm_compile.cli import main
from vllm_compile.errors import DatabaseError
from vllm_compile.schedules.database.executors import Outcome, TaskCrashedError, TaskFailedError
from vllm_compile.schedules.database.machine import fingerprint
from vllm_compile.schedules.database.tasks import Lease, all_tasks, counts, submit
from vllm_compile.schedules.database.worker import Worker, work
from vllm_compile.targets import resolve

from .samples import record

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

from vllm_compile.schedules.database import ray_executor  # noqa: E402
from vllm_compile.schedules.database.ray_executor import RayExecutor, connect  # noqa: E402

TASKS = 12


def where(payload) -> Outcome:
    """Its node, once tasks have begun at so many nodes: each leaves its name in the folder."""
    number, folder, nodes = payload
    node = ray.get_runtime_context().get_node_id()
    Path(folder, node).touch()
    while len(os.listdir(folder)) < nodes:
        time.sleep(0.05)
    return Outcome(node, [record(config={"task": number})])


def fail(number) -> Outcome:
    raise ValueError(f"{number} is no good")


def crash(number) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    return Outcome()


def hang(number) -> Outcome:
    time.sleep(1000)
    return Outcome()


HANDLERS = {"where": where, "fail": fail, "crash": crash, "hang": hang}


@pytest.fixture(scope="module")
def cluster():
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    made = Cluster()
    made.add_node(wait=False, include_dashboard=False, **small)
    made.add_node(wait=False, **small)
    made.wait_for_nodes(timeout=300)
    yield made
    ray.shutdown()
    made.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def places(cluster):
    return connect(cluster.address)


@pytest.fixture(scope="module")
def executor(places):
    return RayExecutor(HANDLERS, 300, places[0])


def task(kind: str, payload: object = 3) -> Lease:
    return Lease(1, kind, payload, 1, 1)


def test_tasks_spread_over_both_nodes(places, database, tmp_path):
    assert len({place.node for place in places}) == 2
    submit(database, "where", [[number, str(tmp_path), 2] for number in range(TASKS)])
    executors = [RayExecutor(HANDLERS, 300, place) for place in places]
    workers = [Worker(database, each, ["where"], f"w{i}") for i, each in enumerate(executors)]
    done = work(workers, Event(), until_empty=True)
    assert (done.completed, done.failed, done.lost) == (TASKS, 0, 0)
    assert counts(database)["done"] == TASKS
    ran = {t.payload[0]: (t.result, t.worker) for t in all_tasks(database)}
    assert set(ran) == set(range(TASKS))
    assert set(ran.values()) == {(place.node, f"w{i}") for i, place in enumerate(places)}


@pytest.mark.parametrize(
    ("kind", "words", "crashed"), [("fail", "ValueError: 3 is no good", False), ("crash", "its process ended", True)]
)
def test_failed_attempts(executor, kind, words, crashed, tmp_path):
    with pytest.raises(TaskFailedError, match=words) as raised:
        executor.run(task(kind), Event())
    assert isinstance(raised.value, TaskCrashedError) == crashed
    assert executor.run(task("where", [0, str(tmp_path), 1]), Event()).records  # and goes on


def test_each_place_says_what_it_can_measure(places, executor):
    """A node's CPU where it has no GPU; with GPUs side by side nothing is measured on the CPU."""
    assert executor.machines() == [fingerprint(resolve("cpu"))]
    busy = RayExecutor(HANDLERS, 60, places[0])
    busy._place = replace(places[0], gpu=True)  # of which this node has none to ask for
    assert busy.machines() == []


def test_each_place_says_whether_its_gpus_can_be_told_apart(places, monkeypatch):
    monkeypatch.setattr(ray_executor, "is_ambiguous", lambda: True)
    assert not RayExecutor(HANDLERS, 300, places[0]).is_ambiguous(), "no GPU there"
    for answer in (True, False):
        monkeypatch.setattr(ray_executor, "is_ambiguous", lambda answer=answer: answer)
        of_a_gpu = RayExecutor(HANDLERS, 300, places[0])
        of_a_gpu._place = replace(places[0], gpu=True)  # of which this node has none to ask for
        assert of_a_gpu.is_ambiguous() == answer


def test_hang(places):
    with pytest.raises(TaskCrashedError, match="longer than 4 s"):
        RayExecutor(HANDLERS, 4, places[0]).run(task("hang"), Event())


def test_stops_when_the_lease_is_lost(executor):
    lost = Event()
    Timer(0.5, lost.set).start()
    start = time.monotonic()
    with pytest.raises(TaskFailedError, match="lease was lost"):
        executor.run(task("hang"), lost)
    assert time.monotonic() - start < 120


def test_from_the_command_line(cluster, database, url, capsys):
    """A task that no node can do: its reason comes from a node's own process."""
    submit(database, "measure", [{"target": "cpu", "family": "none", "ranges": []}], max_attempts=2)
    arguments = [
        "worker",
        "--db",
        url,
        "--executor",
        "ray",
        "--ray-address",
        cluster.address,
        "--until-empty",
        "--json",
    ]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer == {"completed": 0, "failed": 2, "lost": 0}
    assert "candidates cannot be built" in all_tasks(database)[0].error


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_no_cluster(address):
    with pytest.raises(DatabaseError, match=f"no Ray cluster at '{address}'"):
        connect(address)
