"""Families beyond Llama behind vLLM's scheduler: the same tokens as Hugging Face, past their sliding windows."""

from __future__ import annotations

import os

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams, TokensPrompt

import vllm_compile
from tests.test_families import NEW_TOKENS, continued, prompts, random_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("family", "target"),
    [("Falcon", "cpu"), ("Gemma 2", "cpu"), ("GPT-2", "cpu"), ("Mixtral", "cpu"), ("Mistral", "gaudi2")],
)
def test_same_tokens(family, target, tmp_path):
    """Prefilled in chunks, all requests at once.  A program for a Gaudi runs on the CPU."""
    model, requests = random_model(family), prompts()
    model.save_pretrained(tmp_path / "model")
    artifact = vllm_compile.compile(tmp_path / "model", target=target, out=tmp_path / "artifact").artifact
    llm = LLM(str(artifact), skip_tokenizer_init=True, max_num_batched_tokens=32, max_num_seqs=4, max_model_len=96)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=ids.tolist()) for ids in requests], sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens == [continued(model, ids) for ids in requests]
