"""The executor that forks a server's worker: when it does, and under `vllm serve` on a CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

pytest.importorskip("vllm")

from transformers import AutoModelForCausalLM
from vllm.utils import system_utils
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from examples import demo
from vllm_compile.runtime import vllm_executor
from vllm_compile.runtime.vllm_executor import ForkedWorkerExecutor
from vllm_compile.runtime.vllm_processes import FORKED, METHOD

PROMPT = [5, 6, 7, 8]
END_LIMIT = 60  # seconds that a server and its processes may take to end


class TestMethod:
    """How the worker is started, by vLLM's own rule, while the executor is made."""

    @pytest.fixture
    def method(self, monkeypatch):
        """`method(threads)`, where so many Python threads are alive."""
        used = []

        def init(self, vllm_config, monitor_workers=True):
            assert (vllm_config, monitor_workers) == ("configuration", False)
            used.append(system_utils.get_mp_context().get_start_method())

        monkeypatch.setattr(MultiprocExecutor, "__init__", init)
        monkeypatch.setenv(METHOD, "spawn")

        def start(threads: int = 1) -> str:
            monkeypatch.setattr(vllm_executor.threading, "active_count", lambda: threads)
            ForkedWorkerExecutor("configuration", monitor_workers=False)
            assert os.environ[METHOD] == "spawn"
            return used.pop()

        return start

    def test_is_fork(self, method):
        assert method() == "fork"

    def test_is_vllms_beside_threads(self, method, monkeypatch):
        lines = []
        monkeypatch.setattr(vllm_executor.logger, "warning", lambda text, *values: lines.append(text % values))
        assert method(threads=3) == "spawn"
        assert lines == ["The worker is not forked, as 2 Python threads run beside the engine's"]

    @pytest.mark.parametrize("reason", ["cuda_is_initialized", "in_wsl"])
    def test_is_vllms_where_it_always_spawns(self, reason, method, monkeypatch):
        monkeypatch.setattr(system_utils, reason, lambda: True)
        assert method() == "spawn"

    def test_is_as_it_was_after_a_failure(self, method, monkeypatch):
        def fail(self, vllm_config, **options):
            assert os.environ[METHOD] == "fork"
            raise RuntimeError("the worker does not start")

        monkeypatch.setattr(MultiprocExecutor, "__init__", fail)
        with pytest.raises(RuntimeError, match="does not start"):
            method()
        assert os.environ[METHOD] == "spawn"


def test_vllm_finds_it_by_its_name():
    named = SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend=FORKED))
    assert Executor.get_class(named) is ForkedWorkerExecutor
    assert ForkedWorkerExecutor.supports_async_scheduling()


@pytest.fixture(scope="module")
def expected(tiny) -> list[int]:
    """Hugging Face's greedy tokens."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": demo.NEW_TOKENS, "min_new_tokens": demo.NEW_TOKENS, "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    return out[0, len(PROMPT) :].tolist()


@pytest.fixture
def server(tiny_fp32, tmp_path):
    """`vllm serve`, which spawns its engine, told to have the worker forked: on a CPU an artifact's has no process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    port, log = demo.free_port(), tmp_path / "log"
    command = [demo.installed("vllm"), "serve", tiny_fp32, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--distributed-executor-backend", FORKED, "--kv-cache-memory-bytes", str(1 << 24)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    try:
        server = demo.Server(process, tiny_fp32, port, log, time.monotonic())
        server.wait()
        yield server
    finally:
        demo.stop(process)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "by"), [("front end", signal.SIGTERM), ("engine", signal.SIGKILL), ("worker", signal.SIGKILL)], ids=str
)
def test_server(server, expected, victim, by):
    """Whichever of its processes ends first: the others do, too."""
    assert server.complete(PROMPT).tokens == expected
    front_end = psutil.Process(server.process.pid)
    everyone = [front_end, *front_end.children(recursive=True)]
    (worker,) = (process for process in everyone if process.parent() in everyone[1:])
    engine = worker.parent()
    assert engine.parent() == front_end
    assert program(worker) == program(engine) != program(front_end), "the engine is spawned, the worker is its fork"
    {"front end": front_end, "engine": engine, "worker": worker}[victim].send_signal(by)
    server.process.wait(END_LIMIT)
    deadline = time.monotonic() + END_LIMIT
    while left := [process for process in everyone if running(process)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def program(process: psutil.Process) -> bytes:
    """Addresses that Linux chose when the process's program was started: a fork has its parent's."""
    return Path(f"/proc/{process.pid}/auxv").read_bytes()


def running(process: psutil.Process) -> bool:
    """Not one that has ended and that nobody has waited for."""
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
