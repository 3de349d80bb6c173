"""vLLM's own scheduler, runner and sampler around a program that is known to be right.

The program is `torch_program`, so a failure here is one of the seam's: a tensor of the batch that
vLLM means otherwise than we do.  The engine runs in this process.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
pytest.importorskip("vllm")

from vllm import LLM, SamplingParams
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from tests.conftest import SEED
from tests.runtime import torch_program
from tests.runtime.tiny_llama import TEXT, as_artifact, save_model
from vllm_compile.errors import ArtifactError, BucketError, UnsupportedError
from vllm_compile.runtime import program as programs
from vllm_compile.runtime import vllm_config, vllm_processes
from vllm_compile.runtime.buckets import BucketPlan, Limits, Work
from vllm_compile.runtime.gpu import Gpu
from vllm_compile.runtime.vllm_config import ServingConfig, refuse_uneven_cache, refuse_unknown_version
from vllm_compile.targets import resolve
from vllm_compile.targets.cuda import CHIPS

NEW_TOKENS = 24
OPTIONS = {
    "kv_cache_memory_bytes": 1 << 24,
    "block_size": 32,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "disable_log_stats": False,
}


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "load", torch_program.load)
        yield


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


def greedy_by_hugging_face(model, prompt: list[int], **options) -> list[int]:
    ids = torch.tensor([prompt])
    options |= {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "pad_token_id": 1}
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


def greedy_by_vllm(llm, prompts: list[list[int]], **options) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, **options)
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def expected(model, prompts) -> list[list[int]]:
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
        assert greedy_by_vllm(llm, prompts) == expected
        steps = program_of(llm).steps
        assert any(tokens > requests > 1 for tokens, requests in steps), "prefill and decode in one step"
        assert max(tokens for tokens, _ in steps) == 64, "the longer prompts in chunks"

    def test_cached_prefix(self, llm, prompts, expected):
        before = metric(llm, "vllm:prefix_cache_hits")
        assert greedy_by_vllm(llm, prompts[-2:]) == expected[-2:]
        assert greedy_by_vllm(llm, prompts[-1:]) == expected[-1:]
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
        assert greedy_by_vllm(llm, prompts[2:5], repetition_penalty=1.3) == theirs

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
        assert [token for piece in pieces for token in piece] == expected[5]

    def test_a_wrong_block_table_is_noticed(self, llm, prompts, expected, monkeypatch):
        right = torch_program.TorchProgram.forward

        def wrong(self, ids, positions, kv, table_RW, *rest):
            return right(self, ids, positions, kv, (table_RW - 1).clamp(min=0), *rest)

        monkeypatch.setattr(torch_program.TorchProgram, "forward", wrong)
        llm.reset_prefix_cache()
        assert greedy_by_vllm(llm, prompts) != expected
        llm.reset_prefix_cache()


def test_preemption(artifact, model, prompts):
    """Eleven blocks of 32 tokens: five of these requests fit in with two blocks each, but not with three."""
    crowd = [prompts[7][i : i + 60] for i in range(8)]
    frozen = gc.get_freeze_count()
    with serving(artifact, num_gpu_blocks_override=12, max_model_len=320) as llm:
        assert program_of(llm).frozen == frozen, "in a process that is the user's it is left to vLLM"
        assert greedy_by_vllm(llm, crowd) == [greedy_by_hugging_face(model, prompt) for prompt in crowd]
        assert metric(llm, "vllm:num_preemptions") > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float16"}, "compiled for torch.float32, not for torch.float16"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"kv_cache_dtype": "fp8"}, "a cache of another dtype"),
        ({"tensor_parallel_size": 2}, "tensor or pipeline parallelism"),
        ({"enable_lora": True}, "LoRA"),
        ({"quantization": "fp8"}, "quantization"),
    ],
)
def test_refusals(artifact, options, words):
    with pytest.raises(UnsupportedError, match=words):
        LLM(artifact, **OPTIONS | options)


@pytest.mark.parametrize("version", ["dev", "0.25.1", "0.34.0", "0.34.0.dev3+g1234567", "1.0.0"])
def test_untested_version(artifact, version, monkeypatch):
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(UnsupportedError, match=rf"vLLM {re.escape(version)} .*: install vLLM >=0.26,<0.34"):
        LLM(artifact, **OPTIONS)


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1rc1", "0.33.2.dev5+gabc"])
def test_tested_versions(version):
    refuse_unknown_version(version)


def test_a_cache_of_two_widths_needs_a_newer_vllm(artifact):
    program = programs.load(artifact, weights=False)
    refuse_uneven_cache(program, "0.26.0")
    program.cache_width = 0
    refuse_uneven_cache(program, "0.31.0")
    with pytest.raises(UnsupportedError, match=r"install vLLM 0\.31 or newer"):
        refuse_uneven_cache(program, "0.30.2")


class TestBuckets:
    """Of the program that is served: compared with the server's limits while vLLM builds its configuration."""

    LIMITS: ClassVar[dict] = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256}

    @pytest.fixture
    def configured(self, artifact, monkeypatch):
        limits = Limits(4, 64, 256, 32, cache_blocks=30)
        plan = BucketPlan(limits.largest, Work(1.0, 1.0), 32)
        monkeypatch.setattr(torch_program.TorchProgram, "buckets", plan)
        own = {"block_size": None, "kv_cache_memory_bytes": 1 << 24, "num_gpu_blocks_override": 30}
        return lambda **more: EngineArgs(artifact, **own | self.LIMITS | more).create_engine_config()

    def test_of_the_servers_limits(self, configured):
        """In the plan's blocks, which vLLM's own are not; smaller limits do too."""
        for more in ({}, {"max_num_seqs": 2}, {"num_gpu_blocks_override": 9}):
            assert configured(**more).cache_config.block_size == 32

    def test_decide_how_large_the_cache_is(self, configured, monkeypatch):
        """Where nobody else does: free memory must not decide whether a server starts."""
        own = {"kv_cache_memory_bytes": None, "num_gpu_blocks_override": None}
        cache = configured(**own).cache_config
        assert cache.kv_cache_memory_bytes == 30 << 14, "blocks of 16 KB"
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with pytest.raises(BucketError, match=r"\[4, 1, 32\].*--num-gpu-blocks-override 65536"):
            configured(**own)

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            ({"max_num_seqs": 5}, r"no bucket covers \[5, 1, 30\].*--max-num-seqs 5"),
            ({"max_num_batched_tokens": 128}, r"no bucket covers \[1, 128, 8\].*--max-num-batched-tokens 128"),
            ({"max_model_len": 289}, r"no bucket covers \[1, 64, 9\].*--max-model-len 289"),
            ({"num_gpu_blocks_override": 31}, r"no bucket covers \[4, 1, 31\].*--num-gpu-blocks-override 31"),
            ({"num_gpu_blocks_override": None}, r"no bucket covers \[4, 1, 32\]"),
            ({"block_size": 64}, "for KV blocks of 32 tokens, not 64"),
        ],
        ids=str,
    )
    def test_that_are_too_small(self, more, words, configured):
        with pytest.raises(BucketError, match=words):
            configured(**more)


@pytest.fixture
def h200(monkeypatch):
    """An artifact for an H200, on one; `h200(n)`: its weights take n bytes."""
    monkeypatch.setattr(torch_program.TorchProgram, "manifest", {"target": {"name": "cuda"}}, raising=False)
    card = Gpu("NVIDIA H200", (9, 0), (580, 0), 141 * 10**9)
    monkeypatch.setattr("vllm_compile.runtime.gpu.detect", lambda: card)

    def weigh(size: int) -> None:
        for name in ("weight_bytes", "stored_bytes"):
            monkeypatch.setattr(torch_program.TorchProgram, name, lambda self: size, raising=False)

    weigh(0)
    return weigh


class TestWorkerProcess:
    """Beside the engine's, for models whose steps take the GPU less time than the host."""

    @pytest.fixture
    def backend(self, artifact, h200, monkeypatch):
        """What vLLM's configuration comes to have as its executor."""

        def configured(
            size: int = 0, multiprocessing: str = "1", cores: float = 4, method: str = "fork", **options
        ) -> str:
            h200(size)
            config = EngineArgs(artifact, **OPTIONS | options).create_engine_config()
            config.parallel_config.distributed_executor_backend = options.get("distributed_executor_backend", "uni")
            with monkeypatch.context() as patch:
                patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", multiprocessing)
                patch.setenv("VLLM_WORKER_MULTIPROC_METHOD", method)
                patch.setattr(vllm_processes, "usable_cores", lambda: cores)
                patch.setattr(current_platform, "is_cpu", lambda: False)
                ServingConfig.verify_and_update_config(config)
            return config.parallel_config.distributed_executor_backend

        return configured

    def test_of_a_small_model(self, backend):
        assert backend(4 << 30) == "mp"

    @pytest.mark.parametrize(
        "otherwise",
        [
            {"size": 12 << 30},
            {"multiprocessing": "0"},
            {"cores": 3.5},
            {"method": "spawn"},
            {"additional_config": {"worker_process": False}},
        ],
        ids=["a large model", "an engine in the user's process", "few cores", "a server", "a user who chose"],
    )
    def test_not_of(self, backend, otherwise):
        assert backend(**otherwise) == "uni"

    def test_several_engines_of_a_host_share_its_cores(self, h200, artifact, monkeypatch):
        config = EngineArgs(artifact, **OPTIONS).create_engine_config()
        config.parallel_config.distributed_executor_backend = "uni"
        config.parallel_config.data_parallel_size_local = 2
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
        for cores, backend in ((7, "uni"), (8, "mp")):
            monkeypatch.setattr(vllm_processes, "usable_cores", lambda cores=cores: cores)
            vllm_processes.run_in_worker_process(config, 0)
            assert config.parallel_config.distributed_executor_backend == backend

    @pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 1.5), ("max 100000", 6), ("", 6), (None, 6)])
    def test_cores_of_a_control_group(self, tmp_path, monkeypatch, quota, cores):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6))
        file = tmp_path / "cpu.max"
        if quota is not None:
            file.write_text(quota)
        assert vllm_processes.usable_cores(file) == cores

    @pytest.mark.parametrize("otherwise", [{"size": 12 << 30}, {"cores": 1}, {"method": "spawn"}], ids=str)
    def test_of_those_who_ask(self, backend, otherwise):
        assert backend(additional_config={"worker_process": True}, **otherwise) == "mp"

    def test_another_executor_is_left_as_it_is(self, backend):
        assert backend(distributed_executor_backend="external_launcher") == "external_launcher"


class TestGraphSizes:
    """Of decode batches, as vLLM's configuration has them once it has asked ours for what is to be set."""

    @pytest.fixture
    def sizes(self, artifact, h200, monkeypatch):
        """(ours, vLLM's) for a server's limits, as on an H200, and for what a user sets of the compilation's."""

        def configured(chosen: dict | None = None, **limits) -> tuple[list[int], list[int]]:
            config = EngineArgs(artifact, **OPTIONS | limits).create_engine_config()
            compilation, pair = config.compilation_config, []
            with monkeypatch.context() as patch:
                patch.setattr(current_platform, "is_cpu", lambda: False)
                for asked in (True, False):
                    mode = None if asked else CUDAGraphMode.FULL_DECODE_ONLY
                    unset = {
                        "cudagraph_mode": mode,
                        "cudagraph_capture_sizes": None,
                        "max_cudagraph_capture_size": None,
                    }
                    for name, value in (unset | (chosen or {})).items():
                        setattr(compilation, name, value)
                    if asked:
                        ServingConfig.verify_and_update_config(config)
                    config._set_cudagraph_sizes()
                    assert compilation.max_cudagraph_capture_size == max(compilation.cudagraph_capture_sizes)
                    pair.append(compilation.cudagraph_capture_sizes)
            return pair[0], pair[1]

        return configured

    def test_fewer_than_vllms(self, sizes):
        ours, theirs = sizes(max_num_seqs=1024, max_num_batched_tokens=16384)
        assert (len(ours), len(theirs)) == (31, 51)
        assert set(ours) < set(theirs)
        assert [size for size in ours if size <= 64] == [size for size in theirs if size <= 64]
        assert max(ours) == max(theirs)

    @pytest.mark.parametrize(
        ("requests", "tokens"), [(1, 64), (3, 64), (64, 8192), (100, 8192), (300, 300), (513, 520)]
    )
    def test_every_batch_of_vllms_graphs_has_one(self, requests, tokens, sizes):
        """None above what vLLM would capture; none of more requests than are served, which vLLM would drop."""
        ours, theirs = sizes(max_num_seqs=requests, max_num_batched_tokens=tokens)
        assert max(ours) == min(requests, 512)
        assert max(ours) <= max(theirs)
        for batch in range(1, max(ours) + 1):
            padded = min(size for size in ours if size >= batch)
            assert padded - batch < (8 if batch <= 64 else 16 if batch <= 256 else 32)

    @pytest.mark.parametrize(
        ("chosen", "options"),
        [
            ({"cudagraph_capture_sizes": [1, 7, 300]}, {}),
            ({"max_cudagraph_capture_size": 300}, {}),
            ({"cudagraph_mode": CUDAGraphMode.FULL}, {}),
            ({}, {"performance_mode": "interactivity"}),
            ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}),
        ],
        ids=str,
    )
    def test_of_those_who_choose_are_vllms(self, chosen, options, sizes):
        ours, theirs = sizes(chosen, max_num_seqs=512, max_num_batched_tokens=8192, **options)
        assert ours == theirs


@pytest.mark.parametrize(
    ("chip", "memory", "told"), [("h100", 80, 0), ("h100", 140, 1), ("h200", 79, 1), (None, 140, 0)]
)
def test_another_chip_is_told_in_one_line(chip, memory, told, monkeypatch):
    card = Gpu("NVIDIA H200", (9, 0), (580, 0), memory * 10**9)
    monkeypatch.setattr("vllm_compile.runtime.gpu.detect", lambda: card)
    lines = []
    monkeypatch.setattr(vllm_config.logger, "warning", lambda text, *values: lines.append(text % values))
    target = {"name": "rocm"} if chip is None else resolve(chip).described()
    vllm_config.tell_other_chip(SimpleNamespace(directory="artifact", manifest={"target": target}))
    assert [line.count("\n") for line in lines] == [0] * told
    assert all(f"chosen for {CHIPS[chip].name}" in line for line in lines)
    assert all(f"--target {'h200' if chip == 'h100' else 'h100'}" in line for line in lines)


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
