"""One engine in a process of its own, timed on request.

Reads one JSON request per line, `{"prompts": [[ids...], ...], "new_tokens": [n, ...]}`, and answers
with the seconds that greedy generation of exactly n tokens for each prompt took; the first answer,
before any request, is how long it took to load the engine, and until its first token.  Engines:
`compiled` and `vllm` (vLLM as its users run it), `vllm-all-cores`, `vllm-eager`, `hf` (transformers).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], list[int]], None]

PEERS = ("vllm", "vllm-all-cores", "vllm-eager", "hf")


def vllm_engine(model: str, options: dict[str, Any]) -> Generate:
    """vLLM's own loop, with its defaults."""
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        model,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **options,
    )

    def generate(prompts: list[list[int]], new_tokens: list[int]) -> None:
        sampling = [
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False) for count in new_tokens
        ]
        llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], sampling, use_tqdm=False)

    return generate


def hf_engine(model: str) -> Generate:
    """transformers' generate with its default KV cache; of prompts of one length, as many tokens each."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()

    def generate(prompts: list[list[int]], new_tokens: list[int]) -> None:
        (count,) = set(new_tokens)
        ids = torch.tensor(prompts)
        with torch.no_grad():
            network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )

    return generate


def start(engine: str, model: str, options: dict[str, Any]) -> Generate:
    """The engine called `engine`, loaded with the model in directory `model`; `options` are vLLM's."""
    if engine == "hf":
        return hf_engine(model)
    return vllm_engine(model, {**options, "enforce_eager": engine == "vllm-eager"})


def main(engine: str, model: str, options: str = "{}") -> None:
    """Serve requests from stdin until it ends; answers go to the stdout this process was given."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever an engine prints must not be taken for an answer
    began = time.perf_counter()
    generate = start(engine, model, json.loads(options))
    loaded = time.perf_counter() - began
    generate([[1, 2, 3]], [1])
    print(json.dumps({"loaded": loaded, "first_token": time.perf_counter() - began}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        generate(request["prompts"], request["new_tokens"])
        print(json.dumps({"seconds": time.perf_counter() - began}), file=answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
