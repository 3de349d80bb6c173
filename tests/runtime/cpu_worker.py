"""vLLM's worker for CPUs with what `OneWorkerExecutor` sends to one."""

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_compile.runtime.vllm_worker import WholeSteps


class WholeStepsWorker(WholeSteps, CPUWorker):
    """Named on a server's command line."""
