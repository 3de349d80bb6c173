"""The most probable token of each row of logits: an entry point of its own, for targets that have a kernel for it."""

from __future__ import annotations

import tvm
from tvm import relax

from vllm_compile.ops import ARGMAX

from .base import counted_pass
from .outline_layers import LOGITS

GREEDY = "greedy"


@counted_pass("add_greedy")
def add_greedy(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """An engine whose requests want no more than that need not sample from logits.

    Before:
        logits(hidden, lm_head): return linear(hidden, lm_head)
    After:
        logits(hidden, lm_head): return linear(hidden, lm_head)
        greedy(logits): return argmax(logits)
    """
    logits = relax.Var("logits", module[LOGITS].body.body.ty)
    builder = relax.BlockBuilder(module)
    with builder.function(GREEDY, [logits]):
        with builder.dataflow():
            tokens = builder.emit_output(ARGMAX({"logits": logits}))
        builder.emit_func_output(tokens)
    module = builder.get()
    module[GREEDY] = relax.utils.copy_with_new_vars(module[GREEDY])
    return module, 1
