"""Attention of prompts over the paged KV cache, where FlashAttention does not do it.

Operations: 4 * H * D a pair of a query and a token that it sees.  Bytes: 4 * KH * D a cached token, read once for
TOKENS = 128 / group queries.  Within a window of W tokens a prompt of T has T * W such pairs at most: 8,192 tokens of
Gemma-2-9B's (H = 16, D = 256, W = 4,096) 25 million, as its first queries see less: 412 GFLOP a layer, 1.0 ms at
400 TFLOP/s, which is about what mma.sync reaches on an H100.  What a thread block copies meanwhile is 4 * D bytes for
512 * D operations (128 rows), one for 128: 3.1 TB/s, from L2.

Rows that are held: 16 a warp; sums take D / 2 registers of a thread, scores KEYS / 2.
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
        wide = spec.input("q").size(2) > 128
        return (Variant(1, {"keys": 32 if wide else 64, "blocks": 1 if spec.input("q").size(2) > 64 else 2}),)

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
