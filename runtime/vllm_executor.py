"""vLLM's executor of worker processes, which forks them from an engine that was itself spawned, as a server's is.

vLLM's command line has every process spawned, and a worker that is spawned imports everything once more: a third round
after the front end's and the engine's.  What spawning is for is over by then: the engine is no copy of the front end,
and starts its worker before it initializes CUDA or starts a Python thread.  vLLM forks the worker of an `LLM` in that
same state, from an engine that is itself a fork of the user's process, with whatever was done there.
"""

from __future__ import annotations

import threading
from typing import Any

from vllm.logger import init_logger
from vllm.utils.system_utils import set_env_var
from vllm.v1.executor.multiproc_executor import MultiprocExecutor

logger = init_logger("vllm.compiled_artifact")  # below vLLM's own, which says where lines go


class ForkedWorkerExecutor(MultiprocExecutor):
    """Named in vLLM's configuration by `vllm_processes.FORKED`; of one worker, which is ready when this returns.

    vLLM asks an environment variable for each process that it starts, and spawns all the same, with a warning, where
    CUDA is initialized, in Ray's actors and in WSL.  The worker keeps the variable, as an `LLM`'s has it.
    """

    def __init__(self, vllm_config: Any, *args: Any, **options: Any):
        if (threads := threading.active_count()) > 1:  # what one of them holds locked would stay so in the worker
            logger.warning("The worker is not forked, as %d Python threads run beside the engine's", threads - 1)
            super().__init__(vllm_config, *args, **options)
            return
        with set_env_var("VLLM_WORKER_MULTIPROC_METHOD", "fork"):
            super().__init__(vllm_config, *args, **options)
