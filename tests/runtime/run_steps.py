"""Prompts through a compiled model in given steps."""

import torch

from vllm_compile.paged_batch import PagedBatch
from vllm_compile.runtime.program import Program


def run_steps(program: Program, prompts: list[torch.Tensor], steps: list[list[int]]) -> list[torch.Tensor]:
    """Logits of each prompt when step i feeds the tokens of request r up to steps[i][r]."""
    batch = PagedBatch(program.plan.model, [len(prompt) for prompt in prompts])
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    begin = [0] * len(prompts)
    for end in steps:
        ids = torch.cat([p[b:e] for p, b, e in zip(prompts, begin, end, strict=True)])
        hidden = program(ids, kv=batch.kv, **batch.step(begin, end))
        logits = program.logits(hidden)
        parts = logits.clone().split([e - b for b, e in zip(begin, end, strict=True)])
        for row, part in zip(rows, parts, strict=True):
            row.append(part)
        begin = end
    return [torch.cat(row) for row in rows]
