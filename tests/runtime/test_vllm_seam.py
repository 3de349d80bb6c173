"""vLLM's own scheduler, runner and sampler around a program that is known to be right.

The program is `torch_program`, so a failure here is one of the seam's: a tensor of the batch that
vLLM means otherwise than we do.  The engine runs in this process.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
pytest.importorskip("vllm")

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from tests.conftest import SEED
from tests.greedy import Tokens, decided, same_tokens
from tests.runtime import torch_program
from tests.runtime.tiny_llama import TEXT, as_artifact, save_model
from tests.runtime.torch_program import OPTIONS
from vllm_compile.errors import ArtifactError
from vllm_compile.runtime import program as programs

NEW_TOKENS = 24


pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder):
    return save_model(folder / "source", SEED)


@pytest.fixture(scope="module")
def artifact(model, folder) -> str:
    return str(as_artifact(folder / "source", folder / "artifact"))


@pytest.fixture(scope="module")
def prompts(model) -> list[list[int]]:
    """Random ids, from one token to more than three chunks; two of them share a long beginning."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = (1, 2, 31, 32, 33, 64, 100, 200)
    random = [torch.randint(2, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    return [*random, random[-1][:150] + random[-2][:20]]


@contextmanager
def serving(artifact: str, **options):
    """An engine in this process, which can hold one at a time."""
    llm = LLM(artifact, **OPTIONS | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="class")
def frozen_before():
    return gc.get_freeze_count()


@pytest.fixture(scope="class")
def llm(artifact, frozen_before):
    """As in a process of its own, which this one is not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_compile.runtime.vllm_model.parent_process", lambda: "a front end")
        with serving(artifact) as llm:
            yield llm


def greedy_by_hugging_face(model, prompt: list[int], **options) -> Tokens:
    """As far as they are decided."""
    ids = torch.tensor([prompt])
    options |= {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 1}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    return decided(torch.cat(out.scores))


def greedy_by_vllm(llm, prompts: list[list[int]], **options) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, **options)
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def expected(model, prompts) -> list[Tokens]:
    return [greedy_by_hugging_face(model, prompt) for prompt in prompts]


def program_of(llm) -> torch_program.TorchProgram:
    return llm.apply_model(lambda model: model.program)[0]


def metric(llm, name: str) -> float:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


class TestOneEngine:
    def test_settings(self, llm):
        config = llm.llm_engine.vllm_config
        assert config.load_config.load_format == "vllm_compile"
        assert config.compilation_config.mode.name == "NONE"
        assert config.compilation_config.cudagraph_mode.name == "NONE"
        assert config.model_config.disable_cascade_attn
        assert config.model_config.dtype == torch.float32
        assert config.cache_config.kv_cache_layout == "LBHNC"
        assert program_of(llm).limits == (64, 8)

    def test_imports_are_no_garbage_to_collect_while_loading(self, llm, frozen_before):
        """Before vLLM freezes them itself, which it does once all is loaded."""
        assert program_of(llm).frozen - frozen_before > 100_000

    def test_batches_and_chunks_equal_hugging_face(self, llm, prompts, expected):
        assert same_tokens(greedy_by_vllm(llm, prompts), expected)
        steps = program_of(llm).steps
        assert any(tokens > requests > 1 for tokens, requests in steps), "prefill and decode in one step"
        assert max(tokens for tokens, _ in steps) == 64, "the longer prompts in chunks"

    def test_cached_prefix(self, llm, prompts, expected):
        before = metric(llm, "vllm:prefix_cache_hits")
        assert same_tokens(greedy_by_vllm(llm, prompts[-2:]), expected[-2:])
        assert same_tokens(greedy_by_vllm(llm, prompts[-1:]), expected[-1:])
        assert metric(llm, "vllm:prefix_cache_hits") > before

    def test_logprobs(self, llm, model, prompts):
        params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1)
        (output,) = llm.generate([TokensPrompt(prompt_token_ids=prompts[6])], params, use_tqdm=False)
        ids = prompts[6] + list(output.outputs[0].token_ids)
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        given = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        ours = torch.tensor([given[i][ids[i + 1]].logprob for i in range(len(given))])
        torch.testing.assert_close(ours, logprobs_TV[torch.arange(len(given)), ids[1:]], rtol=1e-4, atol=1e-4)

    def test_penalties(self, llm, model, prompts):
        theirs = [greedy_by_hugging_face(model, prompt, repetition_penalty=1.3) for prompt in prompts[2:5]]
        assert same_tokens(greedy_by_vllm(llm, prompts[2:5], repetition_penalty=1.3), theirs)

    def test_structured_output(self, llm):
        params = SamplingParams(
            temperature=0,
            max_tokens=16,
            structured_outputs=StructuredOutputsParams(regex=r"[0-9]{3}-[0-9]{2}"),
        )
        (output,) = llm.generate([TEXT], params, use_tqdm=False)
        digits, _, more = output.outputs[0].text.partition("-")
        assert (len(digits), len(more)) == (3, 2)
        assert (digits + more).isdigit()

    def test_streaming(self, llm, prompts, expected):
        params = SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, output_kind=RequestOutputKind.DELTA
        )
        llm.llm_engine.add_request("stream", TokensPrompt(prompt_token_ids=prompts[5]), params)
        pieces = []
        while llm.llm_engine.has_unfinished_requests():
            pieces += [output.outputs[0].token_ids for output in llm.llm_engine.step()]
        assert len(pieces) == NEW_TOKENS
        assert same_tokens([[token for piece in pieces for token in piece]], expected[5:6])

    def test_a_wrong_block_table_is_noticed(self, llm, prompts, expected, monkeypatch):
        right = torch_program.TorchProgram.forward

        def wrong(self, block_table, **rest):
            return right(self, block_table=(block_table - 1).clamp(min=0), **rest)

        monkeypatch.setattr(torch_program.TorchProgram, "forward", wrong)
        llm.reset_prefix_cache()
        assert not same_tokens(greedy_by_vllm(llm, prompts), expected)
        llm.reset_prefix_cache()


def test_preemption(artifact, model, prompts):
    """Eleven blocks of 32 tokens: five of these requests fit in with two blocks each, but not with three."""
    crowd = [prompts[7][i : i + 60] for i in range(8)]
    frozen = gc.get_freeze_count()
    with serving(artifact, num_gpu_blocks_override=12, max_model_len=320) as llm:
        assert program_of(llm).frozen == frozen, "in a process that is the user's it is left to vLLM"
        assert same_tokens(greedy_by_vllm(llm, crowd), [greedy_by_hugging_face(model, prompt) for prompt in crowd])
        assert metric(llm, "vllm:num_preemptions") > 0


def test_damage_is_reported_before_an_engine_starts(artifact, monkeypatch):
    def damaged(directory, weights=True):
        raise ArtifactError("kernels.so: SHA-256 differs from the manifest's")

    monkeypatch.setattr(programs, "load", damaged)
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        LLM(artifact, **OPTIONS)


@pytest.mark.slow
def test_the_engine_imports_no_tvm(artifact):
    """In a process of its own, up to the first step, where the stand-in needs the references beside TVM."""
    code = f"""
import sys
from vllm_compile.runtime import program
from tests.runtime import torch_program
program.load = torch_program.load
from vllm import LLM
llm = LLM({artifact!r}, kv_cache_memory_bytes=1 << 24, block_size=32)
assert llm.apply_model(lambda model: type(model).__name__) == ["VllmCompileForCausalLM"]
assert "tvm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
