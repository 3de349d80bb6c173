"""What runs on a GPU machine alone: steps with prompts replayed from CUDA graphs, beside the same steps run at once.

    python -m tests.runtime.prompt_graph_cases ARTIFACT     # of `compile --weightless`; a GPU, vLLM for FlashAttention

A replay is compared bit for bit with what the program computes of the same inputs, padding included, and with the step
without padding, which other kernels may compute: within an error.  Weights, tokens and lengths are random; the seed is
printed.
"""

from __future__ import annotations

import argparse
import random
import secrets
import sys
from pathlib import Path
from typing import Any

import torch

from vllm_compile.accuracy import relative_error
from vllm_compile.paged_batch import BLOCK_SIZE, PagedBatch
from vllm_compile.runtime.program import Program, load
from vllm_compile.runtime.prompt_graphs import PromptGraphs, cuda_graphs

MOST_TOKENS, MOST_REQUESTS, LONGEST = 512, 128, 2000
STEPS = 60
CLOSE = 5e-2  # bf16 rounded in another order, layer by layer; with another request's tokens it is about 1


def draw_step(rng: random.Random) -> tuple[list[int], list[int]]:
    """Cached tokens of each request before the step and after it: some decode, some are prompts."""
    requests = rng.choice([1, 1, 2, 3, 10, 60])
    begin, end, left = [], [], rng.randint(requests + 1, MOST_TOKENS)
    for request in range(requests):
        rest = requests - request - 1
        count = left - rest if rest == 0 else min(rng.choice([1, 1, rng.randint(1, 200)]), left - rest)
        left -= count
        begin.append(rng.choice([0, rng.randrange(LONGEST - MOST_TOKENS)]))
        end.append(begin[-1] + count)
    return begin, end


def copies(batch: PagedBatch) -> list[torch.Tensor]:
    return [cache.clone() for cache in batch.kv]


def check(program: Program, seed: int) -> int:
    """How many steps differ."""
    rng, failed, worst = random.Random(seed), 0, 0.0
    program.prepare(MOST_TOKENS, MOST_REQUESTS)
    batch = PagedBatch(program.plan.model, [LONGEST] * 60, program.device)
    for cache in batch.kv:
        cache.normal_()
    graphs = PromptGraphs(
        lambda **step: program.forward(**step, kv=batch.kv),
        MOST_TOKENS,
        MOST_REQUESTS,
        LONGEST // BLOCK_SIZE,
        program.device,
        cuda_graphs(),
    )
    for number in range(STEPS):
        begin, end = draw_step(rng)
        step = batch.step(begin, end)
        columns = rng.choice([0, 40])  # that an engine's table has beyond the blocks of a request, or ours
        step["block_table"] = torch.nn.functional.pad(step["block_table"][: len(begin)], (0, columns))
        count = len(step["positions"])
        step["input_ids"] = torch.randint(program.vocab_size, [count], dtype=torch.int32, device=program.device)
        before = copies(batch)
        replayed_TD, cached = graphs.forward(**step), copies(batch)
        assert replayed_TD is not None
        replayed_TD = replayed_TD.clone()
        padded = next(graph.inputs for graph in graphs._graphs if graph.tokens >= count)

        def at_once(inputs: dict[str, torch.Tensor], count: int = count, before: Any = before) -> torch.Tensor:
            for cache, old in zip(batch.kv, before, strict=True):
                cache.copy_(old)
            return program.forward(**inputs, kv=batch.kv)[:count]

        same = at_once(padded).equal(replayed_TD) and all(map(torch.equal, batch.kv, cached))
        error = relative_error(replayed_TD, at_once(step))
        worst = max(worst, error)
        if not same or not error < CLOSE:
            failed += 1
            print(f"step {number} of {len(begin)} requests, {count} tokens: same bits {same}, error {error:.2e}")
    print(f"seed {seed}: {STEPS} steps, {failed} failed; beside steps without padding the error is {worst:.2e} at most")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    program = load(options.artifact, weights=False)
    program.load_dummy_weights(options.seed)
    with torch.inference_mode():
        return 1 if check(program, options.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
