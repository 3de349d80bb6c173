"""Attention over the paged KV cache: the family around paged_attention.py, and how a cache is split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from tvm import tirx

from vllm_compile.spec import OpSpec
from vllm_compile.targets.rocm import RocmTarget

from ..family import Config, KernelFamily, Variant
from .combine import MOST_SPLITS, combine_rounds
from .footprint import Footprint
from .paged_attention import TILE, paged_attention

MOST_HEAD_DIM = 256
WAVES = (4, 2, 1)  # of a thread block; they share the rows of a tile evenly
BLOCKS = (2, 1, 4)  # of a compute unit, up to which caches are split
CONTEXT = 1024  # cached tokens of a request where configurations are ranked, as `analyze` takes them by default
SOFTMAX = 64  # vector instructions of a tile's scores: scale, mask, maximum, exponentials, rounding, roughly


def _lds_bytes(spec: OpSpec, waves: int) -> int:
    """Of what waves leave each other: sums, the largest score and the weight of each query; and a count."""
    heads, head_dim, kv_heads = spec.input("q").size(1), spec.input("q").size(2), spec.input("kv").size(1)
    return 4 * waves * (head_dim * heads // kv_heads + 2 * TILE + 1)


def _splits(config: Config, pairs: int, target: RocmTarget) -> int:
    """Parts of each token's cache, of so many pairs of a token and a KV head: as the kernel computes it."""
    return max(min(config["blocks"] * target.compute_units // max(pairs, 1), MOST_SPLITS), 1)


@dataclass(frozen=True)
class PagedAttention(KernelFamily):
    """`paged_attention` in bf16, up to 16 query heads a KV head, head sizes 64, 128 and 256.

    The cache's blocks hold a multiple of 16 tokens.
    """

    name: str = "rocm.paged_attention"
    op: str = "paged_attention"

    def serves(self, spec: OpSpec, target: RocmTarget) -> bool:
        q, kv = spec.input("q"), spec.input("kv")
        group, rest = divmod(q.size(1), kv.size(1))
        if kv.size(3) != 2 * q.size(2):  # values of another width than keys
            return False
        return q.dtype == "bfloat16" and not rest and group <= TILE and q.size(2) in (64, 128, MOST_HEAD_DIM)

    def variants(self, spec: OpSpec, target: RocmTarget) -> Sequence[Variant]:
        """As many waves as there is LDS for what they leave there: 32 KiB at most."""
        return (Variant(1, {"waves": 4 if spec.input("q").size(2) <= 128 else 2, "blocks": BLOCKS[0]}),)

    def space(self, spec: OpSpec, target: RocmTarget) -> Sequence[Config]:
        pairs = product(WAVES, BLOCKS)
        return [{"waves": w, "blocks": b} for w, b in pairs if _lds_bytes(spec, w) <= target.lds_bytes]

    def admits(self, spec: OpSpec, config: Config, min_tokens: int, target: RocmTarget) -> bool:
        return config in self.space(spec, target)

    def footprint(self, spec: OpSpec, config: Config, tokens: int, target: RocmTarget) -> Footprint:
        """Of so many requests that decode (tuning ranks at 4 alone), each behind `CONTEXT` cached tokens."""
        heads, head_dim, kv_heads = spec.input("q").size(1), spec.input("q").size(2), spec.input("kv").size(1)
        waves, own, group = config["waves"], head_dim // TILE, heads // kv_heads
        splits = _splits(config, tokens * kv_heads, target)
        turns = -(-CONTEXT // TILE // (splits * waves))
        cached = turns * waves * TILE * 4 * head_dim  # bytes that a block reads
        queries = 2 * group * head_dim + (4 if splits > 1 else 2) * group * head_dim  # read; what is written
        return Footprint(
            bytes=tokens * kv_heads * (CONTEXT * 4 + 4 * group) * head_dim,
            blocks=tokens * kv_heads * splits,
            waves=waves,
            rounds=2 * turns + 2,  # of a turn: the block table, then K and V; before them the request, and its length
            block_bytes=cached + queries,
            mfmas=turns * 2 * own,  # D / 16 instructions for scores, as many for sums
            instructions=turns * (4 * own + SOFTMAX + 2 * own),  # sums rescaled, softmax, loads
            lds_bytes=2 * _lds_bytes(spec, waves),
            rounds_after=combine_rounds(splits, head_dim) if splits > 1 else 0,
        )

    def launches(self, spec: OpSpec, config: Config, tokens: int, target: RocmTarget) -> int:
        """Two where caches are split."""
        return 2 if _splits(config, tokens * spec.input("kv").size(1), target) > 1 else 1

    def build(self, spec: OpSpec, config: Config, target: RocmTarget) -> tirx.PrimFunc:
        q, kv_heads = spec.input("q"), spec.input("kv").size(1)
        blocks = config["blocks"] * target.compute_units
        return paged_attention(q.size(1), kv_heads, q.size(2), spec.attribute("scale"), config["waves"], blocks)
