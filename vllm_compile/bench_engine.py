"""One engine of a benchmark, in a process of its own (bench_worker.py) and as the benchmark sees it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from .errors import VllmCompileError

# By default vLLM keeps one core for its scheduler and computes on the others; on two cores that is one.
ENVIRONMENTS = {"vllm-all-cores": {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))}}

LOOK_SECONDS = 0.2  # between two looks whether an engine rests: twenty ticks of the kernel's clock
RESTING_SHARE = 0.1  # of a core, at most
LONGEST_REST = 5.0  # seconds


class Engine:
    """A worker process."""

    def __init__(self, name: str, model: Path, options: dict[str, Any], log: Path) -> None:
        self.name, self._log = name, log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_compile.bench_worker", name, str(model), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **ENVIRONMENTS.get(name, {})},
        )
        try:
            ready = self._answer()
        except BaseException:
            self.close()
            raise
        self.load_seconds, self.first_token_seconds = ready["loaded"], ready["first_token"]

    def seconds(self, prompts: list[list[int]], new_tokens: list[int]) -> float:
        """How long generating so many tokens for each prompt takes."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer that is missing then says so
            print(json.dumps({"prompts": prompts, "new_tokens": new_tokens}), file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def rest(self) -> None:
        """Wait until its processes hardly compute, so that they do not take a core from the engine that comes next.

        vLLM's workers look out for more work, without a pause, for a second after what they were last asked for
        (`SpinCondition` of its shm_broadcast.py).  Who never rests is waited for no longer than LONGEST_REST.
        """
        deadline, used = time.monotonic() + LONGEST_REST, self._cpu_seconds()
        while time.monotonic() < deadline:
            time.sleep(LOOK_SECONDS)
            before, used = used, self._cpu_seconds()
            # Less than before: a process has ended, and what it used is not known any more.
            if 0 <= used - before <= RESTING_SHARE * LOOK_SECONDS:
                return

    def _cpu_seconds(self) -> float:
        """That its processes, and those they started, have used so far."""
        worker, used = psutil.Process(self._process.pid), 0.0
        for process in (worker, *worker.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                used += times.user + times.system
        return used

    def close(self) -> None:
        """End the process and those it started, so that the next engine finds the memory free."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=20)
        finally:  # whoever is impatient
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            kept = Path(f"bench-{self.name}.log")
            shutil.copy(self._log, kept)
            raise VllmCompileError(f"engine {self.name} ended; why is in {kept}")
        return json.loads(line)
