"""Decode attention over the paged KV cache, split along it so that the whole chip reads.

Bytes: 4 * KH * D a cached token, read once for all queries of its group; 4 * H * D operations, far below what the
tensor cores do meanwhile.  Llama-3.1-8B: 4,096 bytes a token and layer; 16 requests of 1,024 tokens are 67 MB, 14 us
at 4.8 TB/s; one of 131,072 is 537 MB, 112 us.

Parts: each request's KV heads are cut until there are about as many thread blocks as the chip holds, but a share is no
shorter than `short_tiles`, a part no shorter than three quarters of that: starting another block, and adding up what
two of them found, costs as much as reading so much.  Where lengths differ, longer requests have more parts
(attention_pieces.cuh).  Two blocks of 4 warps fit on a multiprocessor (96 KB of stages each at D = 128), or one of 8:
either way warps * (stages - 1) * 16 * 4 * D bytes are under way, 128 KB, above the 29 KB that a multiprocessor's share
of 4.8 TB/s needs at 800 ns of latency.

Many requests keep a multiprocessor busy with four blocks that are at different points of theirs: of the time of warps
that see 200 cached tokens, two fifths go by waiting for tiles (Nsight Compute's samples, 64 requests of Llama-3.1-8B)
while others read.  At D = 128 they have three warps of 168 registers each, at D = 64 four of 128: what there is; 96
and 128 KB are under way.

Within a window of W tokens a query reads W / 16 + 1 tiles at most, whatever the context: Mistral-7B-v0.1 (4,096 bytes
a token and layer, W = 4,096) 16.8 MB a request and layer, 3.5 us.  A soft cap costs an exponential and a division more
for each of a tile's 16 * 8 scores: 16 cycles of a multiprocessor's special functions for 64 * D bytes, which take
230 ns at D = 128 and 36 bytes a nanosecond.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily, Prologue, Variant, Vendor
from .launch import VECTOR_BYTES, Launch, kernel

TILE = 16
WARPS = 4
SHORT_TILES = 8
MOST_GROUP, MOST_HEAD_DIM = 16, 256
LEAST_STAGES, MOST_STAGES = 2, 6
MOST_SPLITS = 64  # blocks for a KV head of a request
PROMPTS = "prompts"  # the option by which a call asks for prefill_attention.py's kernel
MOST_BLOCKS = 264  # of a launch that has several for a KV head of a request


@dataclass(frozen=True)
class PagedAttention(KernelFamily):
    """`paged_attention` in bf16, up to 16 query heads a KV head, head sizes that are multiples of 32 up to 256.

    The cache's blocks hold a multiple of 16 tokens.
    """

    name: str = "cuda.paged_attention"
    op: str = "paged_attention"

    @property
    def options(self) -> frozenset[str]:
        return frozenset({"window", "soft_cap"})

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        q, kv = spec.input("q"), spec.input("kv")
        group, rest = divmod(q.size(1), kv.size(1))
        if kv.size(3) != 2 * q.size(2):  # values of another width than keys
            return False
        fits = group <= MOST_GROUP and q.size(2) % 32 == 0 and q.size(2) <= MOST_HEAD_DIM
        return q.dtype == "bfloat16" and not rest and fits

    def variants(self, spec: OpSpec, target: CudaTarget) -> Sequence[Variant]:
        return default_variants(spec, target)

    def vendor(self, spec: OpSpec, target: CudaTarget) -> Vendor:
        return prefill(spec)

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        return attention_kernel(spec, spec, "paged_attention", ("q", "kv"), config, target)


def default_variants(attention: OpSpec, target: CudaTarget) -> Sequence[Variant]:
    """One large thread block on each multiprocessor while there are no more KV heads than those, then two, then four.

    They add up in orders of their own: a request's bits are the same in batches of one of them that cut it alike.
    The large one has twice the tiles under way before the kernels before have ended, and fewer parts to add up.
    """
    q, kv_heads = attention.input("q"), attention.input("kv").size(1)
    head_dim = q.size(2)
    turned = (q.size(1) // kv_heads + 2) * (2 * head_dim + VECTOR_BYTES)

    def config(blocks: int, warps: int, short_tiles: int) -> Config:
        stages = (target.shared_bytes_of(blocks) - turned) // (warps * TILE * 4 * head_dim)
        if stages < LEAST_STAGES:
            return config(blocks, warps // 2, short_tiles)
        return {"blocks": blocks, "warps": warps, "stages": min(stages, MOST_STAGES), "short_tiles": short_tiles}

    columns = head_dim * -(-(q.size(1) // kv_heads) // 8)  # of sums in registers, of eight queries each
    many = WARPS - (columns > 64) - (columns > 128)
    tiers = [config(1, 2 * WARPS, 2 * SHORT_TILES), config(2, WARPS, SHORT_TILES), config(4, many, SHORT_TILES)]
    served = [tier["blocks"] * target.multiprocessors // kv_heads for tier in tiers[:-1]]  # requests, at most
    least = [1, *(requests + 1 for requests in served)]
    ends = [*least[1:], math.inf]
    return [Variant(begin, tier) for begin, tier, end in zip(least, tiers, ends, strict=True) if begin < end]


def most_splits(window: int, short_tiles: int) -> int:
    """Thread blocks for a KV head of a request, at most; 0 is no window."""
    tiles = -(-(window - 1) // TILE) + 1  # at worst it starts with the last token of one
    return min(MOST_SPLITS, -(-tiles // short_tiles)) if window else MOST_SPLITS


def attention_scale(attention: OpSpec) -> tirx.PrimExpr:
    """What products of queries and keys are multiplied by to be exponents of 2."""
    return T.float32(attention.attribute("scale") * math.log2(math.e))


def score_options(attention: OpSpec) -> list[int]:
    """Arguments of the template in scores.cuh, none where it has its defaults."""
    window, soft_cap = attention.option("window"), attention.option("soft_cap")
    return [window, *struct.unpack("I", struct.pack("f", soft_cap))] if window or soft_cap else []


def attention_kernel(
    spec: OpSpec,
    attention: OpSpec,
    function: str,
    tokens: Sequence[str],
    config: Config,
    target: CudaTarget,
    beside: int = 0,
) -> tirx.PrimFunc:
    """The kernel of a call that is, or ends in, the `paged_attention` call `attention`.

    Args:
        function: in the header of the same name.
        tokens: inputs that it takes before the block table.
        beside: bytes of shared memory that it needs beside the stages.
    """
    kv_heads, head_dim = attention.input("kv").size(1), attention.input("q").size(2)
    group = attention.input("q").size(1) // kv_heads
    warps, stages = config["warps"], config["stages"]
    blocks = min(config["blocks"] * target.multiprocessors, MOST_BLOCKS)
    stage_bytes = warps * stages * TILE * 4 * head_dim
    most = most_splits(attention.option("window"), config["short_tiles"])

    def launch(call):
        requests = call.dims[Sym.REQUESTS]
        fitting = T.floordiv(blocks, T.max(requests, 1) * kv_heads)
        splits = T.max(1, T.min(most, fitting))
        return Launch([splits, kv_heads, requests], 32 * warps, stage_bytes + beside, resident=config["blocks"])

    def arguments(call):
        sizes = (call.dims[Sym.BLOCK_SIZE], call.dims[Sym.TABLE_WIDTH])
        names = (*tokens, "block_table", "seq_lens", "query_start_loc", "out")
        integers = (T.Cast("int32", size) for size in sizes)
        return [*map(call.data, names), attention_scale(attention), *integers, *call.strides("kv")]

    sizes = [head_dim, group, kv_heads, warps, stages, config["short_tiles"], *score_options(attention)]
    instance = f"{function}<{', '.join(map(str, sizes))}>"
    return kernel(spec, f"{function}.cuh", instance, launch, arguments)


def prefill(attention: OpSpec, prologue: Prologue | None = None) -> Vendor:
    """FlashAttention as vLLM ships it; with a window a kernel of ours (prefill_attention.py).

    vLLM 0.26's FlashAttention 3 was wrong on an H200 for a prompt longer than its window: 150 tokens behind 1,050, a
    window of 1,000, two or four query heads a KV head, blocks of 32 or 16.  Its version 2 is there as code for other
    GPUs, which a Hopper's driver had not compiled after 45 s.  (Of a model that is served no longer than its window is,
    where version 3 would do, the compiler does not know.)
    """
    function: str | OpSpec = "paged_attention"
    if attention.option("window"):
        attributes = tuple(sorted((*attention.attributes, (PROMPTS, 1))))
        function = replace(attention, attributes=attributes, options=attention.options | {PROMPTS})
    return Vendor(function, min_tokens=1, prefill=True, prologue=prologue)
