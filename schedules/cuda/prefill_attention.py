"""Attention of prompts over the paged KV cache, where FlashAttention does not do it.

Operations: 4 * H * D a pair of a query and a token that it sees.  Bytes: 4 * KH * D a cached token, read once for
TOKENS = 128 // group queries.  Within a window of W tokens a prompt of T has T * W such pairs at most: 8,192 tokens of
Gemma-2-9B's (H = 16, D = 256, W = 4,096) 25 million, as its first queries see less: 412 GFLOP a layer.

What bounds it is shared memory: each warp reads all keys and values for its 16 rows, and their queries again for each
stage.  With what is copied there these are 12.8 operations a byte at D = 128, 11.6 at 256 (stages of 32 tokens): with
128 bytes a cycle on 132 multiprocessors at 1.755 GHz 380 and 345 TFLOP/s, hence 1.2 ms a layer of that prompt.  A soft
cap takes two more special functions a score, 16 a cycle on each multiprocessor: 0.2 ms there.  What thread blocks copy
meanwhile, 4 * D bytes for 512 * D operations, is 3 TB/s, from L2.

A thread holds D / 2 sums and KEYS / 2 scores of its warp's 16 rows in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily, Variant
from .attention import PROMPTS, PagedAttention, attention_scale, score_options
from .launch import VECTOR_BYTES, Launch, kernel

WARPS = 8
ROWS = 16 * WARPS


@dataclass(frozen=True)
class PrefillAttention(KernelFamily):
    """`paged_attention` of prompts: calls of it that say so, as `paged_attention` in all else."""

    name: str = "cuda.prefill_attention"
    op: str = "paged_attention"

    @property
    def options(self) -> frozenset[str]:
        return PagedAttention().options | {PROMPTS}

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        return bool(spec.option(PROMPTS)) and PagedAttention().serves(spec, target)

    def variants(self, spec: OpSpec, target: CudaTarget) -> Sequence[Variant]:
        head_dim = spec.input("q").size(2)
        roomy = head_dim <= 64 and not spec.option("soft_cap")  # two blocks leave a thread 128 registers
        return (Variant(1, {"keys": 32 if head_dim > 128 else 64, "blocks": 2 if roomy else 1}),)

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        kv_heads, head_dim = spec.input("kv").size(1), spec.input("q").size(2)
        group, keys = spec.input("q").size(1) // kv_heads, config["keys"]
        shared_bytes = ROWS * (2 * head_dim + VECTOR_BYTES) + 2 * keys * 4 * head_dim

        def launch(call):
            stretches = T.floordiv(call.dims[Sym.TOKENS], ROWS // group) + call.dims[Sym.REQUESTS]
            return Launch([stretches, kv_heads], 32 * WARPS, shared_bytes, resident=config["blocks"])

        def arguments(call):
            sizes = (call.dims[Sym.REQUESTS], call.dims[Sym.BLOCK_SIZE], call.dims[Sym.TABLE_WIDTH])
            names = ("q", "kv", "block_table", "seq_lens", "query_start_loc", "out")
            integers = (T.Cast("int32", size) for size in sizes)
            return [*map(call.data, names), attention_scale(spec), *integers, *call.strides("kv")]

        sizes = [head_dim, group, kv_heads, WARPS, keys, *score_options(spec)]
        instance = f"prefill_attention<{', '.join(map(str, sizes))}>"
        return kernel(spec, "prefill_attention.cuh", instance, launch, arguments)
