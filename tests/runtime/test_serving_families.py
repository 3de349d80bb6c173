"""Families beyond Llama behind vLLM's scheduler: the same tokens as Hugging Face, past their sliding windows."""

from __future__ import annotations

import os

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams, TokensPrompt

import vllm_compile
from tests.test_families import LONG_PROMPTS, NEW_TOKENS, continued, prompts, random_model
from vllm_compile.runtime.buckets import BucketPlan, Limits, Work

pytestmark = pytest.mark.slow


def tokens_of_vllm(artifact, requests, **options):
    """Prefilled in chunks, all requests at once."""
    llm = LLM(str(artifact), skip_tokenizer_init=True, max_num_batched_tokens=32, max_num_seqs=4, **options)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids.tolist()) for ids in requests], sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return [list(output.outputs[0].token_ids) for output in outputs]


ON_CPU = ["DeepSeek-V2-Lite", "Falcon", "Gemma 2", "GPT-2", "Mixtral"]


@pytest.mark.parametrize(("family", "target"), [*((family, "cpu") for family in ON_CPU), ("Mistral", "gaudi2")])
def test_same_tokens(family, target, tmp_path):
    """A program for a Gaudi runs on the CPU, in the two buckets that there have to be for the server's limits."""
    model, requests = random_model(family), prompts()
    model.save_pretrained(tmp_path / "model")
    options = {} if target == "cpu" else {"buckets": tmp_path / "b.json"}
    BucketPlan(Limits(4, 32, 96, 16, 1000).largest, Work(1.0, 1.0), 16).write(tmp_path / "b.json")
    artifact = vllm_compile.compile(tmp_path / "model", target=target, out=tmp_path / "artifact", **options).artifact
    assert tokens_of_vllm(artifact, requests, max_model_len=96) == [continued(model, ids) for ids in requests]


def test_longrope_in_both_lengths(tmp_path):
    """By default of the length that it was trained for, with the short factors; asked for more, with the long ones."""
    model = random_model("Phi-3 longrope")
    model.save_pretrained(tmp_path / "model")
    artifact = vllm_compile.compile(tmp_path / "model", out=tmp_path / "artifact").artifact
    for requests, options in ((prompts(), {}), (prompts(LONG_PROMPTS), {"max_model_len": 384})):
        assert tokens_of_vllm(artifact, requests, **options) == [continued(model, ids) for ids in requests]
