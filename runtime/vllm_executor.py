"""vLLM's executor of worker processes, for a small model's one worker: a message a step, and a worker that is forked.

vLLM sends a step in two messages, to compute it and to sample from it, and has an answer to each (what they cost:
benchmarks/baseline.md).

vLLM's command line has every process spawned, and a worker that is spawned imports everything once more: a third round
after the front end's and the engine's.  What spawning is for is over by then: the engine is no copy of the front end,
and starts its worker before it initializes CUDA or starts a Python thread.  vLLM forks the worker of an `LLM` in that
same state, from an engine that is itself a fork of the user's process, with whatever was done there.  Its class is
looked at before, so that a fork has its modules already.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

from vllm import envs
from vllm.logger import init_logger
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.system_utils import set_env_var
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from .vllm_processes import METHOD

logger = init_logger("vllm.compiled_artifact")  # below vLLM's own, which says where lines go


class OneWorkerExecutor(MultiprocExecutor):
    """Named in vLLM's configuration by `vllm_processes.ONE_WORKER`; its worker is ready when it is made.

    vLLM asks an environment variable how to start a process, and spawns all the same, with a warning, where CUDA is
    initialized, in Ray's actors and in WSL.  The worker keeps the variable, as an `LLM`'s has it.
    """

    def __init__(self, vllm_config: Any, *args: Any, **options: Any):
        parallel = vllm_config.parallel_config
        # These have more to say to a worker, and hear more of it.
        others = vllm_config.speculative_config, vllm_config.kv_transfer_config, vllm_config.ec_transfer_config
        understood = hasattr(resolve_obj_by_qualname(parallel.worker_cls), "run_compiled_step")
        self._whole_steps = understood and all(config is None for config in others)
        self._step: Any = None  # announced, and not sent yet
        threads = threading.active_count()  # what one of them holds locked would stay so in the worker
        if envs.VLLM_WORKER_MULTIPROC_METHOD == "fork":
            super().__init__(vllm_config, *args, **options)
        elif threads > 1 or parallel.numa_bind:
            running = f"{threads - 1} Python threads run beside the engine's"
            logger.warning("The worker is not forked, as %s", "numactl starts it" if parallel.numa_bind else running)
            super().__init__(vllm_config, *args, **options)
        else:
            with set_env_var(METHOD, "fork"):
                super().__init__(vllm_config, *args, **options)

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """As vLLM's, but a step that is sampled from at once goes with the call of `sample_tokens` that follows.

        The engine asks this call's result for None, and for errors, which that one reports instead.
        """
        tokens = scheduler_output.total_num_scheduled_tokens  # without any, nothing is sampled
        # What a grammar allows is found out by the engine while the worker computes.
        if not (self._whole_steps and non_block and tokens) or scheduler_output.has_structured_output_requests:
            return super().execute_model(scheduler_output, non_block)
        self._step = scheduler_output
        announced: Future[None] = Future()
        announced.set_result(None)
        return announced

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """As vLLM's."""
        step, self._step = self._step, None
        if step is None:
            return super().sample_tokens(grammar_output, non_block)
        return self.collective_rpc(
            "run_compiled_step",
            args=(step, grammar_output),
            unique_reply_rank=self.output_rank,
            non_block=non_block,
            timeout=envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS,
        )
