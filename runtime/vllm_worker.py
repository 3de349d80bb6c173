"""vLLM's worker for GPUs, which takes a whole step in one call, whose runner repeats steps, and replays prompts."""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

logger = init_logger("vllm.compiled_artifact")  # below vLLM's own, which says where lines go


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
        self._repeat_steps()

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's, which captures its graphs here; ours are recorded behind them."""
        model: Any = self.model_runner.get_model()
        model.prompts = None  # if it is not the first time: vLLM's are not to have a replay of ours in them
        times = super().compile_or_warm_up_model()
        # What sleeps gives its memory away, and a graph may have some of it that vLLM does not know of.
        graphs = self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        if graphs and not self.vllm_config.model_config.enable_sleep_mode:
            try:
                with torch.inference_mode():
                    model.record_prompts(self.vllm_config)
            except torch.OutOfMemoryError:
                logger.warning(
                    "Short prompts are launched kernel by kernel, as there is no memory left for graphs of them: "
                    "a smaller --gpu-memory-utilization leaves some"
                )
        return times

    def wake_up(self, *tags: Any, **named: Any) -> None:
        """As vLLM's: what the runner has written to the GPU's memory may be gone (in 0.26 block tables are)."""
        super().wake_up(*tags, **named)
        self._repeat_steps()

    def _repeat_steps(self) -> None:
        try:
            from .vllm_runner import repeat_steps
        except ImportError as error:  # of a vLLM whose runner is made of other parts
            logger.info("Each step's inputs are prepared anew: %s", error)
        else:
            repeat_steps(self.model_runner)
