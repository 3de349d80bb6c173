"""The executor that forks a server's worker: when it does, and under `vllm serve` on a CPU."""

from __future__ import annotations

import os
import signal
import sys
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
from tests.greedy import Tokens, decided, same_tokens
from vllm_compile.runtime import vllm_executor
from vllm_compile.runtime.vllm_executor import OneWorkerExecutor
from vllm_compile.runtime.vllm_processes import COMPILED_WORKER, METHOD, ONE_WORKER
from vllm_compile.runtime.vllm_worker import WholeSteps

OTHERS = ("speculative_config", "kv_transfer_config", "ec_transfer_config")
CPU_WORKER = "tests.runtime.cpu_worker.WholeStepsWorker"
PROMPT = [5, 6, 7, 8]
END_LIMIT = 60  # seconds that a server and its processes may take to end


def configuration(worker: str = COMPILED_WORKER, numa_bind: bool = False, **others) -> SimpleNamespace:
    parallel = SimpleNamespace(worker_cls=worker, numa_bind=numa_bind)
    return SimpleNamespace(parallel_config=parallel, **dict.fromkeys(OTHERS) | others)


class TestMethod:
    """How the worker is started, by vLLM's own rule, while the executor is made."""

    @pytest.fixture
    def method(self, monkeypatch):
        """`method(threads)`, where so many Python threads are alive."""
        used = []

        def init(self, vllm_config, monitor_workers=True):
            assert not monitor_workers
            used.append(system_utils.get_mp_context().get_start_method())

        monkeypatch.setattr(MultiprocExecutor, "__init__", init)

        def start(threads: int = 1, method: str = "spawn", **options) -> str:
            monkeypatch.setenv(METHOD, method)
            monkeypatch.setattr(vllm_executor.threading, "active_count", lambda: threads)
            OneWorkerExecutor(configuration(**options), monitor_workers=False)
            assert os.environ[METHOD] == method
            return used.pop()

        return start

    def test_is_fork(self, method):
        assert method() == "fork"

    def test_is_vllms_own_of_an_llm(self, method):
        """Which forks beside threads, too."""
        assert method(threads=3, method="fork") == "fork"

    def test_is_vllms_beside_threads_and_with_numactl(self, method, monkeypatch):
        lines = []
        monkeypatch.setattr(vllm_executor.logger, "warning", lambda text, *values: lines.append(text % values))
        assert method(threads=3) == "spawn"
        assert method(numa_bind=True) == "spawn"
        whys = ["2 Python threads run beside the engine's", "numactl starts it"]
        assert lines == [f"The worker is not forked, as {why}" for why in whys]

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


class TestSteps:
    """What is sent for a step, by the calls that the engine makes."""

    @pytest.fixture
    def sent(self, monkeypatch) -> list[tuple]:
        sent = []

        def collective_rpc(self, method, args=(), non_block=False, **options):
            sent.append((method, args, non_block, options["unique_reply_rank"]))
            return "the answer"

        monkeypatch.setattr(MultiprocExecutor, "collective_rpc", collective_rpc)
        return sent

    @pytest.fixture
    def executor(self, monkeypatch, sent):
        monkeypatch.setattr(MultiprocExecutor, "__init__", lambda self, vllm_config: None)

        def made(**options) -> OneWorkerExecutor:
            executor = OneWorkerExecutor(configuration(**options))
            executor.output_rank = 0
            executor.kv_output_aggregator = executor.ec_output_aggregator = None
            return executor

        return made

    def test_a_message_a_step(self, executor, sent):
        executor = executor()
        for step in (scheduled(), scheduled()):
            assert executor.execute_model(step, non_block=True).result() is None
            assert not sent, "before it is known how to sample"
            assert executor.sample_tokens("grammar", non_block=True) == "the answer"
            assert [sent.pop()] == [("run_compiled_step", (step, "grammar"), True, 0)]
            assert not sent

    @pytest.mark.parametrize(
        ("step", "non_block", "options"),
        [
            ({"total_num_scheduled_tokens": 0}, True, {}),
            ({"has_structured_output_requests": True}, True, {}),
            ({}, False, {}),
            ({}, True, {"worker": "vllm.v1.worker.gpu_worker.Worker"}),
            *(({}, True, {name: "one"}) for name in OTHERS),
        ],
        ids=["nothing to sample", "a grammar", "who waits for it", "a worker that knows no such message", *OTHERS],
    )
    def test_two_as_vllms(self, executor, sent, step, non_block, options):
        executor, step = executor(**options), scheduled(**step)
        assert executor.execute_model(step, non_block=non_block) == "the answer"
        assert executor.sample_tokens(None, non_block=True) == "the answer"
        assert sent == [("execute_model", (step,), non_block, 0), ("sample_tokens", (None,), True, 0)]

    def test_a_step_is_sent_once(self, executor, sent):
        """A step with a grammar behind one without."""
        executor = executor()
        for step in (scheduled(), scheduled(has_structured_output_requests=True)):
            executor.execute_model(step, non_block=True)
            executor.sample_tokens(None, non_block=True)
        assert [method for method, *_ in sent] == ["run_compiled_step", "execute_model", "sample_tokens"]

    @pytest.mark.parametrize(("computed", "expected"), [(None, ("sampled", "grammar")), ("nothing to sample", None)])
    def test_what_the_worker_does(self, computed, expected):
        class Worker(WholeSteps):
            def execute_model(self, scheduler_output):
                assert scheduler_output == "step"
                return computed

            def sample_tokens(self, grammar_output):
                return "sampled", grammar_output

        assert Worker().run_compiled_step("step", "grammar") == (expected or computed)


def scheduled(**changed) -> SimpleNamespace:
    """What the scheduler says of a step."""
    return SimpleNamespace(**{"total_num_scheduled_tokens": 3, "has_structured_output_requests": False} | changed)


def test_vllm_finds_it_by_its_name():
    named = SimpleNamespace(parallel_config=SimpleNamespace(distributed_executor_backend=ONE_WORKER))
    assert Executor.get_class(named) is OneWorkerExecutor
    assert OneWorkerExecutor.supports_async_scheduling()


@pytest.fixture(scope="module")
def expected(tiny) -> Tokens:
    """Hugging Face's greedy tokens, which end where a server's do, or where they are not decided."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": demo.NEW_TOKENS, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    return decided(torch.cat(out.scores))


@pytest.fixture
def server(tiny_fp32, tmp_path):
    """`vllm serve`, which spawns its engine, told to have the worker forked: on a CPU an artifact's has no process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # the worker's class is one of the tests'
    options = ["--distributed-executor-backend", ONE_WORKER, "--worker-cls", CPU_WORKER]
    options += ["--kv-cache-memory-bytes", str(1 << 24)]
    with demo.serving(Path(tiny_fp32), tmp_path / "log", options, environment) as server:
        server.wait()
        yield server


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "by"), [("front end", signal.SIGTERM), ("engine", signal.SIGKILL), ("worker", signal.SIGKILL)], ids=str
)
def test_server(server, expected, victim, by):
    """Whichever of its processes ends first: the others do, too."""
    assert same_tokens([server.complete(PROMPT).tokens], [expected])
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
