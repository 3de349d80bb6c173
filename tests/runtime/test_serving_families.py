"""Families beyond Llama behind vLLM's scheduler: the same tokens as Hugging Face, past their sliding windows."""

from __future__ import annotations

import os

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams, TokensPrompt

import vllm_compile
from tests.families import LONG_PROMPTS, NEW_TOKENS, continued, prompts, random_model
from tests.greedy import same_tokens
from vllm_compile.runtime.buckets import BucketPlan, Limits, Work

pytestmark = pytest.mark.slow


def tokens_of_vllm(artifact, requests, **options):
    """Prefilled in chunks, all requests at once."""
    llm = LLM(str(artifact), skip_tokenizer_init=True, max_num_batched_tokens=32, max_num_seqs=4, **options)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids.tolist()) for ids in requests], sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("family", ["DeepSeek-V2-Lite", "Falcon", "Gemma 2", "GPT-2", "Mixtral"])
def test_same_tokens(family, family_artifact):
    model, requests = random_model(family), prompts()
    tokens = tokens_of_vllm(family_artifact(family), requests, max_model_len=96)
    assert same_tokens(tokens, [continued(model, ids) for ids in requests])


def test_same_tokens_of_a_program_for_a_gaudi(tmp_path):
    """It runs on the CPU, in the two buckets that there have to be for the server's limits."""
    model, requests = random_model("Mistral"), prompts()
    model.save_pretrained(tmp_path / "model")
    buckets = tmp_path / "b.json"
    BucketPlan(Limits(4, 32, 96, 16, 1000).largest, Work(1.0, 1.0), 16).write(buckets)
    compiled = vllm_compile.compile(tmp_path / "model", target="gaudi2", out=tmp_path / "artifact", buckets=buckets)
    tokens = tokens_of_vllm(compiled.artifact, requests, max_model_len=96)
    assert same_tokens(tokens, [continued(model, ids) for ids in requests])


@pytest.mark.parametrize("family", ["Phi-3 longrope"])
def test_longrope_in_both_lengths(family, family_artifact):
    """By default of the length that it was trained for, with the short factors; asked for more, with the long ones."""
    model, artifact = random_model(family), family_artifact(family)
    for requests, options in ((prompts(), {}), (prompts(LONG_PROMPTS), {"max_model_len": 384})):
        tokens = tokens_of_vllm(artifact, requests, **options)
        assert same_tokens(tokens, [continued(model, ids) for ids in requests])
