"""The settings an artifact is served with, so that `vllm serve ARTIFACT` needs no flag.

vLLM calls `ServingConfig` while it builds its configuration, in the front-end process and before it starts
any other.  What an artifact cannot serve is refused here, so the user reads one error and not the engine's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from vllm_compile.errors import ArtifactError, TargetError, UnsupportedError
from vllm_compile.targets import cuda, gaudi, rocm

from .buckets import BucketPlan, Limits
from .manifest import PLAN
from .plan import from_json
from .vllm_processes import COMPILED_WORKER, run_in_engine_process, run_in_worker_process

if TYPE_CHECKING:
    from .program import Program

logger = init_logger("vllm.compiled_artifact")  # below vLLM's own, which says where lines go

LOAD_FORMAT, DUMMY_FORMAT = "vllm_compile", "vllm_compile_dummy"
SERVED_BY = ">=0.26,<0.34"  # 0.26 (CUDA) and 0.32 (CPU) are tested, the rest has the same interfaces by its source
# Decode batches that graphs are captured of: vLLM's own up to 64, where kernels change with every 8 or 16 rows; above,
# half as many.
GRAPH_SIZES = (1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 513, 32))
SPARE_TOKENS = 1024  # room for the null block and a part-filled one, at any block size


class ServingConfig(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Serves in the dtype, and up to the length, that the kernels were compiled for."""
        import torch
        from vllm import __version__ as vllm_version

        refuse_unknown_version(vllm_version)
        compiled = model_config.hf_config.dtype
        # For a float32 model vLLM itself chooses bfloat16, which cannot be told from the user's choosing it.
        chosen_by_vllm = torch.bfloat16 if compiled == torch.float32 else compiled
        if model_config.dtype not in (compiled, chosen_by_vllm):
            raise UnsupportedError(
                f"{model_config.model} is compiled for {compiled}, not for {model_config.dtype}: "
                "leave --dtype out, or compile it for that dtype"
            )
        model_config.dtype = compiled
        limit_length(model_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Checks the artifact, and sets whatever differs from vLLM's defaults."""
        from vllm import __version__ as vllm_version
        from vllm.config import CompilationMode, CUDAGraphMode
        from vllm.platforms import current_platform

        refuse_unsupported(vllm_config)
        program = load_for_inspection(vllm_config.model_config.model)
        refuse_uneven_cache(program, vllm_version)
        load = vllm_config.load_config
        load.load_format = DUMMY_FORMAT if load.load_format in ("dummy", DUMMY_FORMAT) else LOAD_FORMAT
        vllm_config.model_config.disable_cascade_attn = True
        compilation = vllm_config.compilation_config
        compilation.mode = CompilationMode.NONE
        if on_cpu := current_platform.is_cpu():
            run_in_engine_process(vllm_config.parallel_config)
            size_cache(vllm_config, program)
        if program.buckets is not None:
            follow_buckets(vllm_config, program, program.buckets)
        if on_cpu or program.manifest["target"]["name"] in gaudi.TARGETS:
            compilation.cudagraph_mode = CUDAGraphMode.NONE
            return
        refuse_small_gpu(program, vllm_config.cache_config.gpu_memory_utilization)
        tell_other_chip(program)
        if vllm_config.parallel_config.worker_cls == "auto":
            vllm_config.parallel_config.worker_cls = COMPILED_WORKER
        run_in_worker_process(vllm_config, program.stored_bytes())
        if compilation.cudagraph_mode is None or compilation.cudagraph_mode.has_piecewise_cudagraphs():
            # Said aloud: vLLM 0.26 drops graphs without a word where torch compiles nothing.
            compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
            choose_graph_sizes(vllm_config)


def choose_graph_sizes(vllm_config: Any) -> None:
    """Has graphs captured of 31 sizes at most, where vLLM would of 51, each of which takes a server's start longer.

    A batch between two sizes runs as the larger.  No size is above vLLM's largest; the largest batch that is served has
    one of its own, up to 512.  Whoever chose sizes or a mode of graphs, a performance mode that does or speculation,
    whose batches are multiples of its drafts, gets vLLM's.
    """
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    if (
        compilation.cudagraph_capture_sizes is not None
        or compilation.max_cudagraph_capture_size is not None
        or vllm_config.performance_mode == "interactivity"
        or vllm_config.speculative_config is not None
    ):
        return
    largest = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, GRAPH_SIZES[-1])
    compilation.cudagraph_capture_sizes = [*(size for size in GRAPH_SIZES if size < largest), largest]


def refuse_unknown_version(version: str) -> None:
    """UnsupportedError where vLLM is older or newer than the interfaces that this package implements."""
    try:
        served = SpecifierSet(SERVED_BY).contains(Version(version), prereleases=True)
    except InvalidVersion:  # of a build from source without tags
        served = False
    if not served:
        raise UnsupportedError(f"vLLM {version} does not serve compiled artifacts: install vLLM {SERVED_BY}")


def refuse_uneven_cache(program: Program, version: str) -> None:
    """UnsupportedError where vLLM gives keys and values of one width only, and the program's have two."""
    if program.cache_width != 2 * program.head_dim and Version(version) < Version("0.31"):
        raise UnsupportedError(
            f"{program.directory}: its keys and values differ in width, as latent attention's do, which vLLM {version} "
            "has no cache for: install vLLM 0.31 or newer"
        )


def limit_length(model_config: Any) -> None:
    """Serves no position that the program has no angles for; vLLM takes some scaled models for longer than they are."""
    plan = Path(model_config.model) / PLAN
    if not plan.is_file():
        return  # whatever is wrong with the artifact is said where it is loaded
    model = from_json(plan.read_text()).model
    longest = max(model.max_positions, model.long_positions)
    if model_config.max_model_len <= model.max_positions:
        return
    if model_config.original_max_model_len not in (None, -1):
        if model_config.max_model_len <= longest:
            return
        raise UnsupportedError(
            f"{model_config.model} is compiled for up to {longest} tokens, not {model_config.max_model_len}: "
            "take a smaller --max-model-len"
        )
    model_config.max_model_len = model.max_positions


def refuse_unsupported(vllm_config: Any) -> None:
    """One error that names everything asked for that a compiled program does not do."""
    model, speculative = vllm_config.model_config, vllm_config.speculative_config
    dtype = str(model.dtype).removeprefix("torch.")
    asked = {
        "tensor or pipeline parallelism": vllm_config.parallel_config.world_size > 1,
        "quantization": model.quantization is not None,
        "LoRA": vllm_config.lora_config is not None,
        "prompt embeddings": model.enable_prompt_embeds,
        "pooling": model.runner_type == "pooling",
        "a cache of another dtype": vllm_config.cache_config.cache_dtype not in ("auto", dtype),
        "speculation from hidden states": speculative is not None and speculative.use_eagle(),
    }
    refused = [feature for feature, wanted in asked.items() if wanted]
    if refused:
        raise UnsupportedError(f"{model.model}: a compiled artifact is not served with {', '.join(refused)}")


def load_for_inspection(directory: str) -> Program:
    """The program without its weights; ArtifactError if it is damaged or made for another machine."""
    from .program import load

    if not Path(directory).is_dir():
        raise ArtifactError(f"{directory} is not a local directory: download the artifact, then serve that")
    return load(directory, weights=False)


def refuse_small_gpu(program: Program, utilization: float) -> None:
    """TargetError where the weights do not fit into vLLM's share of the GPU's memory, before any is read."""
    from . import gpu, kfd

    detect = kfd.detect if program.manifest["target"]["name"] == rocm.NAME else gpu.detect
    card, needed = detect(), program.weight_bytes()
    if needed > utilization * card.memory_bytes:
        raise TargetError(
            f"{program.directory}: its weights take {needed / 1e9:.1f} GB of GPU memory, vLLM may use {utilization:.0%}"
            f" of the {card.memory_bytes / 1e9:.1f} GB of {card.name}: raise --gpu-memory-utilization, "
            "take a larger GPU, or compile with --pack none, which keeps no second copy for large batches"
        )


def tell_other_chip(program: Program) -> None:
    """One line of vLLM's log where the kernels were chosen for another chip; they run, but others may be faster."""
    from . import gpu

    compiled = program.manifest["target"].get("chip")  # of CUDA; artifacts of earlier versions have none
    if compiled is not None and (here := cuda.chip_of(gpu.detect().memory_bytes)) != compiled:
        logger.warning(
            "%s: its kernels were chosen for %s, this is %s; compiled with --target %s it may be faster",
            program.directory,
            cuda.CHIPS[compiled].name if compiled in cuda.CHIPS else compiled,  # one of a later version's
            cuda.CHIPS[here].name,
            here,
        )


def size_cache(vllm_config: Any, program: Program) -> None:
    """Gives the cache a thirty-second of the free memory, at least 16,384 tokens, at most half of it.

    vLLM would take nine tenths of all memory, which fails on a machine that does anything else, and takes as
    long as it takes to write zeros there.  Whoever names a size or a share of memory gets that.
    """
    from vllm.config import CacheConfig
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    cache, model = vllm_config.cache_config, vllm_config.model_config
    if (
        cache.kv_cache_memory_bytes is not None
        or os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        or cache.gpu_memory_utilization != CacheConfig().gpu_memory_utilization
    ):
        return
    weights = sum(file.stat().st_size for file in Path(model.model).glob("*.safetensors"))
    free = max(get_memory_node_info(get_visible_memory_node()[0]).available_memory - weights, 0)
    token = cached_bytes(program)
    wanted = max(free // 32, 16384 * token)
    if model.original_max_model_len is None:
        model.original_max_model_len = -1  # vLLM's word for "as long a context as the cache can hold"
    else:
        wanted = max(wanted, (model.max_model_len + SPARE_TOKENS) * token)
    cache.kv_cache_memory_bytes = max(min(wanted, free // 2), SPARE_TOKENS * token)
    if (buckets := program.buckets) is not None:
        most = max(planned_blocks(buckets), 1) * buckets.block_size * token
        cache.kv_cache_memory_bytes = min(cache.kv_cache_memory_bytes, most)


def follow_buckets(vllm_config: Any, program: Program, buckets: BucketPlan) -> None:
    """Serves in KV blocks of the buckets' size; BucketError where a step may come that none of them covers."""
    from vllm.platforms import current_platform

    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    if not cache.user_specified_block_size:
        cache.block_size, cache.user_specified_block_size = buckets.block_size, True
    memory, block = cache.kv_cache_memory_bytes, cached_bytes(program) * cache.block_size
    if (gigabytes := os.environ.get("VLLM_CPU_KVCACHE_SPACE")) and current_platform.is_cpu():
        memory = int(gigabytes) << 30  # vLLM reads it later, and prefers it
    limits = Limits(
        scheduler.max_num_seqs,
        scheduler.max_num_batched_tokens,
        vllm_config.model_config.max_model_len,
        cache.block_size,
        # Of a cache that takes a share of memory, what was planned for has to do.
        cache.num_gpu_blocks_override or (planned_blocks(buckets) if memory is None else max(memory // block, 1)),
    )
    buckets.check(limits)


def planned_blocks(buckets: BucketPlan) -> int:
    """Blocks of the KV cache that all decoding requests together may have."""
    return max((bucket.blocks for bucket in buckets.buckets if bucket.decodes), default=1)


def cached_bytes(program: Program) -> int:
    """Bytes that a token takes in the caches of all layers."""
    return program.num_layers * program.num_kv_heads * program.cache_width * program.dtype.itemsize
