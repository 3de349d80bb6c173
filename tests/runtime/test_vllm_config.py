"""The settings that vLLM's configuration comes to have for an artifact, and what is refused while it is made.

No engine is started.  The artifact is served by `torch_program`; GPUs are described, not there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
pytest.importorskip("vllm")

from vllm import LLM
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

from tests.conftest import SEED
from tests.runtime import torch_program
from tests.runtime.tiny_llama import save_artifact
from tests.runtime.torch_program import OPTIONS
from vllm_compile.errors import BucketError, UnsupportedError
from vllm_compile.runtime import program as programs
from vllm_compile.runtime import vllm_config, vllm_processes
from vllm_compile.runtime.buckets import BucketPlan, Limits, Work
from vllm_compile.runtime.gpu import Gpu
from vllm_compile.runtime.vllm_config import ServingConfig, refuse_uneven_cache, refuse_unknown_version
from vllm_compile.runtime.vllm_processes import COMPILED_WORKER, METHOD, ONE_WORKER
from vllm_compile.runtime.vllm_worker import CompiledWorker
from vllm_compile.targets import resolve
from vllm_compile.targets.cuda import CHIPS

pytestmark = pytest.mark.usefixtures("stand_in")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> str:
    return str(save_artifact(tmp_path_factory.mktemp("model"), SEED))


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


COMMAND_LINE = f"""
import os
import vllm.entrypoints.cli.main
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm_compile.runtime.vllm_processes import command_line_spawns
cli_env_setup()
print(os.environ[{METHOD!r}], command_line_spawns())
"""


class TestWorkerProcess:
    """Beside the engine's, for models whose steps take the GPU less time than the host."""

    @pytest.fixture
    def backend(self, artifact, h200, monkeypatch):
        """What vLLM's configuration comes to have as its executor."""

        def configured(
            size: int = 0,
            multiprocessing: str = "1",
            cores: float = 4,
            method: str = "fork",
            by_user: bool = False,
            numa_bind: bool = False,
            **options,
        ) -> str:
            h200(size)
            config = EngineArgs(artifact, **OPTIONS | options).create_engine_config()
            config.parallel_config.distributed_executor_backend = options.get("distributed_executor_backend", "uni")
            config.parallel_config.numa_bind = numa_bind
            with monkeypatch.context() as patch:
                patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", multiprocessing)
                patch.setenv(METHOD, method)
                patch.setattr(vllm_processes, "usable_cores", lambda: cores)
                patch.setattr(vllm_processes, "command_line_spawns", lambda: method == "spawn" and not by_user)
                patch.setattr(current_platform, "is_cpu", lambda: False)
                ServingConfig.verify_and_update_config(config)
            return config.parallel_config.distributed_executor_backend

        return configured

    def test_of_a_small_model(self, backend):
        assert backend(4 << 30) == ONE_WORKER

    def test_of_a_server(self, backend):
        """Whose processes vLLM spawns: an executor of ours forks the worker."""
        assert backend(4 << 30, method="spawn") == ONE_WORKER

    @pytest.mark.parametrize(
        "otherwise",
        [
            {"size": 12 << 30},
            {"multiprocessing": "0"},
            {"cores": 3.5},
            {"additional_config": {"worker_process": False}},
        ],
        ids=["a large model", "an engine in the user's process", "few cores", "a user who chose"],
    )
    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_not_of(self, backend, method, otherwise):
        assert backend(method=method, **otherwise) == "uni"

    @pytest.mark.parametrize("otherwise", [{"by_user": True}, {"numa_bind": True}], ids=str)
    def test_that_is_to_be_spawned(self, backend, otherwise):
        """By the user's word, or as numactl's: vLLM spawns it for those who ask, and there is none for others."""
        assert backend(method="spawn", **otherwise) == "uni"
        assert backend(method="spawn", **otherwise, additional_config={"worker_process": True}) == "mp"
        assert backend(**otherwise) == ONE_WORKER, "an LLM's, as ever"

    @pytest.mark.parametrize(
        ("by", "given", "now", "spawns"),
        [
            ("vllm.entrypoints.cli.main", b"", "spawn", True),
            ("vllm.entrypoints.cli.main", f"{METHOD}=spawn".encode(), "spawn", False),
            ("vllm.entrypoints.cli.main", None, "spawn", False),
            ("vllm.entrypoints.cli.main", b"", "fork", False),
            ("a program of the user's", b"", "spawn", False),
        ],
        ids=["vLLM's command line", "the user", "who cannot be known", "nobody", "the user's program"],
    )
    def test_who_has_processes_spawned(self, by, given, now, spawns, tmp_path, monkeypatch):
        monkeypatch.setenv(METHOD, now)
        monkeypatch.delitem(sys.modules, "vllm.entrypoints.cli.main", raising=False)
        monkeypatch.setitem(sys.modules, by, None)
        if given is not None:
            (tmp_path / "environ").write_bytes(b"\0".join([b"HOME=/root", given, b""]))
        assert vllm_processes.command_line_spawns(tmp_path / "environ") == spawns

    @pytest.mark.parametrize("given", [True, False])
    def test_what_a_process_was_started_with(self, given):
        """vLLM's command line sets the variable in any case; Linux says whether it was there before."""
        environment = {name: value for name, value in os.environ.items() if name != METHOD}
        environment |= {METHOD: "spawn"} if given else {}
        command = [sys.executable, "-c", COMMAND_LINE]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        assert done.stdout.splitlines()[-1] == f"spawn {not given}"

    def test_several_engines_of_a_host_share_its_cores(self, h200, artifact, monkeypatch):
        config = EngineArgs(artifact, **OPTIONS).create_engine_config()
        config.parallel_config.distributed_executor_backend = "uni"
        config.parallel_config.data_parallel_size_local = 2
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        monkeypatch.setenv(METHOD, "fork")
        for cores, backend in ((7, "uni"), (8, ONE_WORKER)):
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

    @pytest.mark.parametrize("otherwise", [{"size": 12 << 30}, {"cores": 1}], ids=str)
    def test_of_those_who_ask(self, backend, otherwise):
        for method in ("fork", "spawn"):
            assert backend(additional_config={"worker_process": True}, method=method, **otherwise) == ONE_WORKER

    def test_another_executor_is_left_as_it_is(self, backend):
        assert backend(distributed_executor_backend="external_launcher") == "external_launcher"


@pytest.mark.parametrize("given", ["auto", "the.users"])
def test_worker_class(artifact, h200, monkeypatch, given):
    """Ours, unless a user has one of their own; vLLM asks before it chooses."""
    asked, configure = [], ServingConfig.verify_and_update_config

    def on_a_gpu(config):
        asked.append(config.parallel_config.worker_cls)
        with monkeypatch.context() as patch:
            patch.setattr(current_platform, "is_cpu", lambda: False)
            configure(config)
        asked.append(config.parallel_config.worker_cls)

    monkeypatch.setattr(ServingConfig, "verify_and_update_config", on_a_gpu)
    EngineArgs(artifact, **OPTIONS, worker_cls=given).create_engine_config()
    assert asked == [given, COMPILED_WORKER if given == "auto" else given]
    assert resolve_obj_by_qualname(COMPILED_WORKER) is CompiledWorker


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
