"""Greedy tokens on a GPU: a compiled model behind vLLM, one request at a time and batched, beside Hugging Face.

    python benchmarks/greedy_cuda.py MODEL ARTIFACT     # MODEL: what ARTIFACT was compiled from, with weights

bf16 and fp32 part where two logits lie closer than a rounding, so Hugging Face is compared with itself in both: that is
the agreement to expect.  Prompts are random stretches of heldout.txt where MODEL has it, else random tokens; the seed
is printed.  Tokens that a decode graph ends in are compared with those that vLLM's sampler takes from the same logits.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

REQUESTS, NEW_TOKENS = 16, 16
LENGTHS = range(1, 200)
TEXT = "heldout.txt"


def draw_prompts(model: Path, vocabulary: int, seed: int) -> list[list[int]]:
    """Prompts of different lengths."""
    draw = random.Random(seed)
    lengths = [draw.choice(LENGTHS) for _ in range(REQUESTS)]
    if not (model / TEXT).exists():
        return [draw.choices(range(vocabulary), k=length) for length in lengths]
    ids = AutoTokenizer.from_pretrained(model)((model / TEXT).read_text())["input_ids"]
    begins = [draw.randrange(len(ids) - length) for length in lengths]
    return [ids[begin : begin + length] for begin, length in zip(begins, lengths, strict=True)]


def by_hugging_face(model: Path, prompts: list[list[int]], dtype: torch.dtype) -> list[list[int]]:
    """Greedy tokens of transformers' generate, one prompt at a time."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).cuda().eval()
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        with torch.no_grad():
            out = network.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        found.append(out[0, len(prompt) :].tolist())
    return found


def agreement(a: list[list[int]], b: list[list[int]]) -> str:
    """Tokens that are equal, position by position."""
    pairs = [(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)]
    return f"{sum(x == y for x, y in pairs)} of {len(pairs)}"


class Witness:
    """In the place of vLLM's sampler behind ours: counts the steps that come to it."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.steps = sampler, 0

    def __call__(self, logits: torch.Tensor, batch: Any) -> Any:
        self.steps += 1
        return self.sampler(logits, batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


def compare_samplers() -> dict[str, int]:
    """Has vLLM's sampler choose, too, wherever ours gives tokens of the graph; returns what is counted from now on."""
    from vllm_compile.runtime.vllm_state import GreedySampler

    counts, ours = {"of the graph": 0, "the same by vLLM": 0, "by vLLM alone": 0}, GreedySampler.__call__

    def both(self: GreedySampler, logits: torch.Tensor, batch: Any) -> Any:
        if not isinstance(self._sampler, Witness):
            self._sampler = Witness(self._sampler)
        witness, kept = self._sampler, logits.clone()
        before = witness.steps
        found = ours(self, logits, batch)
        tokens = found.sampled_token_ids
        if witness.steps != before:
            counts["by vLLM alone"] += len(tokens)
        else:
            counts["of the graph"] += len(tokens)
            counts["the same by vLLM"] += int((witness.sampler(kept, batch).sampled_token_ids == tokens).sum())
        return found

    GreedySampler.__call__ = both  # type: ignore[method-assign]
    return counts


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its sampler is in this process
    from vllm import LLM, SamplingParams, TokensPrompt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    options = parser.parse_args()
    counts = compare_samplers()
    llm = LLM(str(options.artifact), skip_tokenizer_init=True, gpu_memory_utilization=0.5)
    prompts = draw_prompts(options.model, llm.llm_engine.model_config.get_vocab_size(), options.seed)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)

    def generate(batch: list[list[int]]) -> list[list[int]]:
        requests = [TokensPrompt(prompt_token_ids=prompt) for prompt in batch]
        return [list(r.outputs[0].token_ids) for r in llm.generate(requests, sampling, use_tqdm=False)]

    batched, single = generate(prompts), [generate([prompt])[0] for prompt in prompts]
    bf16, fp32 = (by_hugging_face(options.model, prompts, dtype) for dtype in (torch.bfloat16, torch.float32))
    print(f"{torch.cuda.get_device_name()}, seed {options.seed}, greedy tokens equal:")
    print(f"  vLLM with the artifact, batched and one request at a time: {agreement(batched, single)}")
    print(f"  the artifact and Hugging Face in bf16: {agreement(batched, bf16)}")
    print(f"  the artifact and Hugging Face in fp32: {agreement(batched, fp32)}")
    print(f"  Hugging Face in bf16 and in fp32: {agreement(bf16, fp32)}")
    print("Tokens " + ", ".join(f"{what} {count}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
