"""Attention of prompts over the paged KV cache, where FlashAttention does not do it.

Operations: 4 * H * D a pair of a query and a token that it sees.  Bytes: 4 * KH * D a cached token, read once for
TOKENS = warps * rows // group queries.  Within a window of W tokens a prompt of T has T * W such pairs at most: 8,192
tokens of Gemma-2-9B's (H = 16, D = 256, W = 4,096) 25 million, as its first queries see less: 412 GFLOP a layer.

Products are mma.sync's, which on Hopper reach 63 % of what wgmma does (Luo et al. 2024): 620 TFLOP/s.  One of 4,096
operations takes 4,096 / rows bytes of keys or values from shared memory, those of scores 4,096 / keys of queries; 4,096
/ (warps * rows) are copied there.  With 32 rows a warp, which D <= 128 leaves registers for, these are 192 bytes, and
352 with 16 and 64 rows a block at D = 256: at 128 bytes a cycle on 132 multiprocessors at 1.755 GHz 630 and 345
TFLOP/s, hence 1.2 ms a layer of that prompt.  From L2 come 4 * D bytes for 4 * D * warps * rows operations: 2.7 TB/s
at 350 TFLOP/s with 128 rows a block, but 5.4 TB/s at 345 with 64, which is the second bound at D = 256.

Two blocks on a multiprocessor: one's products run beside the other's exponentials.  Of these there is one a score, with
a soft cap two special functions more, 16 a cycle: 0.19 cycles then for products of 0.4 at D = 256.

A thread holds rows * D / 32 sums and rows * keys / 32 scores in registers, and where they are held the queries.
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

MOST_SLOTS = 4


@dataclass(frozen=True)
class PrefillAttention(KernelFamily):
    """`paged_attention` of prompts: calls of it that say so, as `paged_attention` in all else."""

    name: str = "cuda.prefill_attention"
    op: str = "paged_attention"

    @property
    def options(self) -> frozenset[str]:
        return PagedAttention().options | {PROMPTS}

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        # Scores are compared before they are scaled.
        return bool(spec.option(PROMPTS)) and PagedAttention().serves(spec, target) and spec.attribute("scale") > 0

    def variants(self, spec: OpSpec, target: CudaTarget) -> Sequence[Variant]:
        """Config: warps of a block, rows of each, keys of a tile, halves of tiles in shared memory (slots), blocks on a
        multiprocessor, whether queries are held in registers.
        """
        head_dim = spec.input("q").size(2)
        tall = head_dim <= 128  # sums of 32 rows fit in registers
        config = {"warps": 4, "rows": 32 if tall else 16, "keys": 64, "blocks": 2, "held": head_dim <= 64}
        room = target.shared_bytes_of(config["blocks"])
        slots = (room // row_bytes(head_dim) - config["warps"] * config["rows"]) // config["keys"]
        return (Variant(1, config | {"slots": min(slots, MOST_SLOTS)}),)

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        kv_heads, head_dim = spec.input("kv").size(1), spec.input("q").size(2)
        group, rows = spec.input("q").size(1) // kv_heads, config["warps"] * config["rows"]
        shared_bytes = (rows + config["slots"] * config["keys"]) * row_bytes(head_dim)

        def launch(call):
            stretches = T.floordiv(call.dims[Sym.TOKENS], rows // group) + call.dims[Sym.REQUESTS]
            return Launch([stretches * kv_heads], 32 * config["warps"], shared_bytes, resident=config["blocks"])

        def arguments(call):
            sizes = (call.dims[Sym.REQUESTS], call.dims[Sym.BLOCK_SIZE], call.dims[Sym.TABLE_WIDTH])
            names = ("q", "kv", "block_table", "seq_lens", "query_start_loc", "out")
            integers = (T.Cast("int32", size) for size in sizes)
            return [*map(call.data, names), attention_scale(spec), *integers, *call.strides("kv")]

        shape = [config[name] for name in ("warps", "rows", "keys", "slots")]
        sizes = [head_dim, group, kv_heads, *shape, int(config["held"]), *score_options(spec)]
        instance = f"prefill_attention<{', '.join(map(str, sizes))}>"
        return kernel(spec, "prefill_attention.cuh", instance, launch, arguments)


def row_bytes(head_dim: int) -> int:
    """Of a query, a key or a value in shared memory."""
    return 2 * head_dim + VECTOR_BYTES
