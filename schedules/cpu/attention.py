"""Causal grouped-query attention over the paged cache, for decode, prefill and mixed batches in one call.

Work is cut into items, (KV head, request, tile of queries), which the threads take one by one from a shared
counter, so that items of different cost (causal prefill, mixed batches) balance on any number of cores.
A request's tiles of queries sit in the slots from `query_start_loc[r] // queries_per_item + r` on: an upper
bound known without a scan, and monotone in r, so that a slot finds its request by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import DTYPE_BYTES, OpSpec
from vllm_compile.targets import Target

from ..family import Config, KernelFamily
from .attention_narrow import Narrow
from .attention_tile import PagedCache, Scores
from .attention_wide import Wide
from .vectors import Vectors

# More than any machine has threads: each takes items until none is left.
WORKERS = 1024
# Rows (queries x heads of a group) of one item: four AVX-512 vectors, enough to pay for reading a tile.
ROWS = 64
# Up to so many rows, tokens in the lanes are faster than rows in the lanes.
NARROW_ROWS = 16


def paged_attention(
    heads: int, kv_heads: int, keys: range, values: range, dtype: str, scores: Scores, target: Target
) -> tirx.PrimFunc:
    """q [T, H, D], kv [B, KH, N, C], table [R, W], seq_lens [R], query_start_loc [R+1] -> [T, H, DV].

    K and V are the columns `keys` (D of them) and `values` (DV) of C.
    """
    group = heads // kv_heads
    head_dim, value_dim, columns = len(keys), len(values), max(keys.stop, values.stop)
    align = DTYPE_BYTES[dtype]
    vectors = Vectors.of(target, dtype, head_dim)
    queries_per_item = max(1, ROWS // group)
    step = 2 * vectors.lanes
    rows = -(-queries_per_item * group // step) * step
    tile = target.attention_tile(columns, align)
    words = head_dim // vectors.values_per_word
    q_word = vectors.word if vectors.pairs else dtype

    @T.prim_func(s_tir=True)
    def kernel(
        q: T.handle,
        kv: T.handle,
        block_table: T.handle,
        seq_lens: T.handle,
        query_start_loc: T.handle,
        out: T.handle,
    ):
        tokens = T.int64()
        blocks = T.int64()
        block_size = T.int64()
        block_stride = T.int64()
        head_stride = T.int64()
        token_stride = T.int64()
        requests = T.int64()
        width = T.int64()
        boundaries = T.int64()
        q_THD = T.match_buffer(q, (tokens, heads, head_dim), dtype, align=align)
        kv_BHNC = T.match_buffer(
            kv,
            (blocks, kv_heads, block_size, columns),
            dtype,
            strides=[block_stride, head_stride, token_stride, 1],
            align=align,
        )
        table_RW = T.match_buffer(block_table, (requests, width), "int32", align=4)
        length_R = T.match_buffer(seq_lens, (requests,), "int32", align=4)
        start_R = T.match_buffer(query_start_loc, (boundaries,), "int32", align=4)
        out_THD = T.match_buffer(out, (tokens, heads, value_dim), dtype, align=align)
        with T.attr(0, "pragma_import_llvm", vectors.ir):
            q_words = T.decl_buffer((tokens * (heads * words),), q_word, data=q_THD.data, align=align)
            out_flat = T.decl_buffer((tokens * (heads * value_dim),), dtype, data=out_THD.data, align=align)
            slots: T.let[T.int32] = T.Cast("int32", T.truncdiv(tokens, T.int64(queries_per_item)) + requests)
            items: T.let[T.int32] = T.Select(requests > T.int64(0), slots * kv_heads, 0)
            next_item = T.alloc_buffer((1,), "int32")
            next_item[0] = 0
            for _ in T.parallel(WORKERS):
                cache = T.meta_var(PagedCache(vectors, keys, values, tile, kv_BHNC, table_RW))
                wide = T.meta_var(Wide(vectors, cache, rows, heads, group, scores))
                narrow = T.meta_var(Narrow(vectors, cache, NARROW_ROWS, heads, group, scores))
                spare = T.meta_var(cache.scratch())
                wide_scratch = T.meta_var(wide.scratch())
                narrow_scratch = T.meta_var(narrow.scratch())
                item = T.alloc_buffer((1,), "int32")
                low = T.alloc_buffer((1,), "int32")
                high = T.alloc_buffer((1,), "int32")
                item[0] = T.call_extern("int32", "vc_fetch_add_one", next_item.data)
                while item[0] < items:
                    head: T.let[T.int32] = T.truncdiv(item[0], slots)
                    # The last tiles of a prefill see the most tokens: they come first.
                    slot: T.let[T.int32] = slots - 1 - T.truncmod(item[0], slots)
                    low[0] = 0
                    high[0] = T.Cast("int32", requests)
                    while high[0] - low[0] > 1:
                        middle: T.let[T.int32] = T.truncdiv(low[0] + high[0], 2)
                        if T.truncdiv(start_R[middle], queries_per_item) + middle <= slot:
                            low[0] = middle
                        else:
                            high[0] = middle
                    request: T.let[T.int32] = low[0]
                    begin: T.let[T.int32] = start_R[request]
                    queries: T.let[T.int32] = start_R[request + 1] - begin
                    length: T.let[T.int32] = length_R[request]
                    first: T.let[T.int32] = (slot - T.truncdiv(begin, queries_per_item) - request) * queries_per_item
                    if T.And(T.And(first >= 0, first < queries), length >= queries):
                        row: T.let[T.int64] = T.Cast("int64", begin + first) * heads + head * group
                        count: T.let[T.int32] = T.min(queries - first, queries_per_item)
                        position: T.let[T.int32] = length - queries + first
                        if count * group <= NARROW_ROWS:
                            narrow.run(narrow_scratch, q_words, out_flat, spare, request, head, row, count, position)
                        else:
                            wide.run(wide_scratch, q_words, out_flat, spare, request, head, row, count, position)
                    item[0] = T.call_extern("int32", "vc_fetch_add_one", next_item.data)

    return kernel


@dataclass(frozen=True)
class PagedAttention(KernelFamily):
    """`paged_attention` for head sizes that are multiples of 16 (of keys and of values) and whole groups of heads."""

    name: str = "cpu.paged_attention"
    op: str = "paged_attention"

    @property
    def options(self) -> frozenset[str]:
        return frozenset({"window", "soft_cap", "shared_values"})

    def serves(self, spec: OpSpec, target: Target) -> bool:
        if spec.op != self.op:
            return False
        q, kv = spec.input("q"), spec.input("kv")
        return q.size(2) % 16 == 0 and spec.outputs[0].size(2) % 16 == 0 and q.size(1) % kv.size(1) == 0

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        q, kv = spec.input("q"), spec.input("kv")
        scores = Scores(spec.attribute("scale"), spec.option("window"), spec.option("soft_cap"))
        keys, values = range(q.size(2)), range(q.size(2), kv.size(3))
        if shared := spec.option("shared_values"):
            values = range(shared)
        return paged_attention(q.size(1), kv.size(1), keys, values, q.dtype, scores, target)
