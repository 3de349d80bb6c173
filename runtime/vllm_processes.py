"""In which process vLLM's one worker runs: the engine's, or one beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.compiled_artifact")  # below vLLM's own, which says where lines go

UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
ONE_WORKER = "vllm_compile.runtime.vllm_executor.OneWorkerExecutor"
COMPILED_WORKER = "vllm_compile.runtime.vllm_worker.CompiledWorker"
METHOD = "VLLM_WORKER_MULTIPROC_METHOD"  # how vLLM starts processes: fork or spawn
# A model of fewer bytes is read by an H200 in 2 ms, which is about what vLLM's scheduler and runner together take for a
# step of 64 requests (benchmarks/baseline.md).
HOST_BOUND_BYTES = 8 << 30
WORKER_CORES = 4  # the front end, the engine and its worker, which both poll, and one to spare


def run_in_worker_process(vllm_config: Any, weight_bytes: int) -> None:
    """Runs the one worker in a process beside the engine's: for steps that take the GPU less time than the host.

    By default vLLM does so for several GPUs only.  While the worker launches a step, the engine schedules the next and
    hands out the tokens of the one before.  An engine that is to run in the user's process has its worker there, too.

    `--additional-config '{"worker_process": true}'` asks for it, and false for the opposite.  Where neither is said, a
    small model's worker gets a process if that can be forked: by vLLM, of an `LLM`, or by our executor, of
    `vllm serve`.  One that is spawned imports everything once more, which a start has to wait for.
    """
    from vllm import envs

    parallel, more = vllm_config.parallel_config, vllm_config.additional_config
    vllm_forks = envs.VLLM_WORKER_MULTIPROC_METHOD == "fork"
    we_fork = command_line_spawns() and not parallel.numa_bind  # which has numactl start processes
    wanted = more.get("worker_process") if isinstance(more, dict) else None
    if wanted is None:
        enough = usable_cores() >= WORKER_CORES * parallel.data_parallel_size_local
        wanted = weight_bytes < HOST_BOUND_BYTES and enough and (vllm_forks or we_fork)
    if wanted and parallel.distributed_executor_backend == "uni" and envs.VLLM_ENABLE_V1_MULTIPROCESSING:
        logger.info(
            "The worker gets a process of its own (--additional-config '{\"worker_process\": false}': it does not)"
        )
        if not (vllm_forks or we_fork):
            parallel.distributed_executor_backend = "mp"
            return
        parallel.distributed_executor_backend = ONE_WORKER


def command_line_spawns(environment: Path = Path("/proc/self/environ")) -> bool:
    """Whether processes are spawned for no other reason than that vLLM's command line has it so by default.

    It sets the variable where the user has not.  Linux keeps in `environment` what a process was started with; where
    that cannot be read, the user is taken to have set it, and so is the program that is not vLLM's command line.
    """
    try:
        given = environment.read_bytes().split(b"\0")
    except OSError:
        return False
    by_user = any(entry.startswith(f"{METHOD}=".encode()) for entry in given)
    return "vllm.entrypoints.cli.main" in sys.modules and not by_user and os.environ.get(METHOD) == "spawn"


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores that this process may use at once; `quota` is where Linux has what its control group is limited to."""
    cores = len(os.sched_getaffinity(0))
    try:
        most, period = quota.read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if most == "max" else min(cores, int(most) / int(period))


def run_in_engine_process(parallel_config: Any) -> None:
    """Runs the one worker inside the engine's process, with a thread for each physical core.

    On a CPU vLLM starts a worker process and leaves a core to the engine: seconds of imports, a copy of each
    step's messages, and half of a two-core machine.  It does so to bind threads to the cores of one memory
    node; where there are several nodes, or the user chose the cores, that is left as it is.
    """
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list

    cpus = get_allowed_cpu_list()
    one_node = len({cpu.numa_node for cpu in cpus}) == 1
    auto = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto") == "auto"
    if not (one_node and auto and parallel_config.distributed_executor_backend == "uni"):
        return
    parallel_config.distributed_executor_backend = UNIPROC
    os.environ.setdefault("OMP_NUM_THREADS", str(len({cpu.physical_core for cpu in cpus})))
    # Torch then asks for huge pages: the cache is there ten times sooner, and read with fewer TLB misses.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
