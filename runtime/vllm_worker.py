"""vLLM's worker for GPUs, which takes a whole step in one call, and whose runner repeats steps."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from .vllm_runner import repeat_steps


class WholeSteps:
    """Mixed into a worker of vLLM's: what `vllm_executor` sends it."""

    def run_compiled_step(self: Any, scheduler_output: Any, grammar_output: Any) -> Any:
        """Computes a step (of text: the wrapper that keeps images is not asked), samples from it, returns as vLLM's."""
        output = self.execute_model(scheduler_output)
        return self.sample_tokens(grammar_output) if output is None else output


class CompiledWorker(WholeSteps, Worker):
    """Named in vLLM's configuration by `vllm_processes.COMPILED_WORKER`."""

    def init_device(self) -> None:
        """As vLLM's, which makes the runner here."""
        super().init_device()
        repeat_steps(self.model_runner)

    def wake_up(self, *tags: Any, **named: Any) -> None:
        """As vLLM's: what the runner has written to the GPU's memory may be gone."""
        super().wake_up(*tags, **named)
        repeat_steps(self.model_runner)
