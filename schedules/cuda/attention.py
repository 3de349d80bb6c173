"""Decode attention over the paged KV cache, split along it so that the whole chip reads.

Bytes: 4 * KH * D a cached token, read once for all queries of its group; 4 * H * D operations, far below what the
tensor cores do meanwhile.  Llama-3.1-8B: 4,096 bytes a token and layer; 16 requests of 1,024 tokens are 67 MB, 14 us
at 4.8 TB/s; one of 131,072 is 537 MB, 112 us.

Splits: two thread blocks fit on a multiprocessor (96 KB of stages each at D = 128), so each request's KV heads are
split until there are about so many blocks.  A block has WARPS * (STAGES - 1) tiles of 16 * 4 * D bytes under way:
64 KB, above the 29 KB that a multiprocessor's share of 4.8 TB/s needs at 800 ns of latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import e, log2

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily, Variant, Vendor
from .launch import Launch, kernel

TILE = 16
WARPS = 4
MOST_GROUP, MOST_HEAD_DIM = 16, 256
MOST_SPLITS = 64
BLOCKS_PER_MULTIPROCESSOR = 2
MOST_PARTS = 264  # that the workspace in paged_attention.cuh has room for


@dataclass(frozen=True)
class PagedAttention(KernelFamily):
    """`paged_attention` in bf16, up to 16 query heads a KV head, head sizes that are multiples of 32 up to 256.

    The cache's blocks hold a multiple of 16 tokens.
    """

    name: str = "cuda.paged_attention"
    op: str = "paged_attention"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        q, kv = spec.input("q"), spec.input("kv")
        group, rest = divmod(q.size(1), kv.size(1))
        if kv.size(3) != 2 * q.size(2):  # values of another width than keys
            return False
        fits = group <= MOST_GROUP and q.size(2) % 32 == 0 and q.size(2) <= MOST_HEAD_DIM
        return q.dtype == "bfloat16" and not rest and fits

    def variants(self, spec: OpSpec, target: CudaTarget) -> Sequence[Variant]:
        head_dim = spec.input("q").size(2)
        share = target.shared_bytes // BLOCKS_PER_MULTIPROCESSOR
        stages = max(2, min(6, share // (WARPS * TILE * 4 * head_dim)))
        return (Variant(1, {"warps": WARPS, "stages": stages}),)

    def vendor(self, spec: OpSpec, target: CudaTarget) -> Vendor:
        """FlashAttention for prefill, as vLLM ships it."""
        return Vendor("paged_attention", min_tokens=1, prefill=True)

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        kv_heads, head_dim = spec.input("kv").size(1), spec.input("q").size(2)
        group = spec.input("q").size(1) // kv_heads
        warps, stages = config["warps"], config["stages"]
        blocks = min(BLOCKS_PER_MULTIPROCESSOR * target.multiprocessors, MOST_PARTS)
        scale = T.float32(spec.attribute("scale") * log2(e))

        def launch(call):
            requests = call.dims[Sym.REQUESTS]
            fitting = T.floordiv(blocks, T.max(requests, 1) * kv_heads)
            splits = T.max(1, T.min(MOST_SPLITS, fitting))
            return Launch([splits, kv_heads, requests], 32 * warps, warps * stages * TILE * 4 * head_dim)

        def arguments(call):
            sizes = (call.dims[Sym.BLOCK_SIZE], call.dims[Sym.TABLE_WIDTH])
            names = ("q", "kv", "block_table", "seq_lens", "query_start_loc", "out")
            return [*map(call.data, names), scale, *(T.Cast("int32", s) for s in sizes), *call.strides("kv")]

        function = f"paged_attention<{head_dim}, {group}, {kv_heads}, {warps}, {stages}>"
        return kernel(spec, "paged_attention.cuh", function, launch, arguments)
