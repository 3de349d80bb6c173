"""Greedy generation with n-gram speculation: prompts as JSON on stdin, texts as the last line of stdout.

python -m tests.runtime.speculate ARTIFACT NEW_TOKENS
"""

import json
import sys

from vllm import LLM, SamplingParams, TokensPrompt

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


def main(artifact: str, new_tokens: str) -> None:
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in json.load(sys.stdin)]
    llm = LLM(artifact, max_model_len=512, max_num_seqs=16, disable_log_stats=False, speculative_config=NGRAM)
    sampling = SamplingParams(temperature=0, max_tokens=int(new_tokens), min_tokens=int(new_tokens))
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    accepted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
    print(json.dumps({"texts": [list(o.outputs[0].token_ids) for o in outputs], "accepted": accepted}))


if __name__ == "__main__":
    main(*sys.argv[1:])
