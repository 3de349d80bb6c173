"""The peer: the buckets that vLLM-Gaudi generates by default, and its other rule.

Written from its documentation ("Bucketing Mechanism") and the behaviour of vllm_gaudi/extension/bucketing of its main
branch of August 2026, as it is started with no option set: prompts one at a time (a prompt batch of at most 1), prefix
caching on and hence attention over lists of blocks ("contiguous PA" off), blocks of 128 tokens.

- Exponential (the default): sizes from min to max whose logarithms are evenly spaced, each rounded up to a multiple
  of step; as many as the binary logarithm of the range, and the minimum itself.
- Linear: powers of two up to step, then every multiple of step.

A step takes the first bucket in lexicographic order that covers it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log2

from vllm_compile.runtime.buckets import Bucket, Limits

LONG_CONTEXT = 8192  # from this max_model_len on, context sizes are chosen otherwise
REFERENCES = 3  # shared blocks count once for each request: at most so many times the cache, it is assumed

Range = Callable[[int, int, int, int], list[int]]


def exponential_range(low: int, step: int, high: int, count: int) -> list[int]:
    """Up to `count` sizes, evenly spaced in their logarithm, and `low` itself if it is 0 or 1."""
    if count <= 1:
        return [high]
    start = step if low in (0, 1) else low
    spaced = {ceil(start * (high / start) ** (i / (count - 1)) / step) * step for i in range(count)}
    sizes = sorted(spaced | ({low} if low in (0, 1) else set()))
    return [*sizes[:-1], min(sizes[-1], high)]


def linear_range(low: int, step: int, high: int, count: int) -> list[int]:
    """Doubling up to `step`, then in steps; `count` plays no part."""
    start = step if low == 0 else low
    doubling = [start << i for i in range(high.bit_length()) if start << i < step and start << i <= high]
    stable = [size for size in range(step, high + 1, step) if size >= start]
    return sorted({*doubling, *stable, *([0] if low == 0 else [])})


def exponential_buckets(limits: Limits) -> list[Bucket]:
    """The buckets of vLLM-Gaudi's default strategy."""
    decodes = _decodes(limits, exponential_range, batch_step=2, block_step=limits.max_requests)
    return _prompts(limits, exponential_range) + decodes


def linear_buckets(limits: Limits) -> list[Bucket]:
    """The buckets of its linear strategy with default settings."""
    decodes = _decodes(limits, linear_range, batch_step=32, block_step=limits.block_size)
    return _prompts(limits, linear_range) + decodes


def _prompts(limits: Limits, sizes: Range) -> list[Bucket]:
    size, tokens, length = limits.block_size, limits.max_tokens, limits.max_length
    most = max(1, (length - (tokens if length >= LONG_CONTEXT else size)) // size)
    queries = sizes(size, size, tokens, ceil(log2(tokens)))
    contexts = sizes(0, 1, most, 2 if most == 1 else ceil(log2(most)) + 1)
    buckets = set()
    for context in contexts:
        for query in queries:
            # In long contexts the largest is another for each length of the query.
            edge = context == max(contexts) and length >= LONG_CONTEXT
            blocks = max((length - query) // size, 0) if edge else context
            if blocks <= ceil((length - 1) / size) and query <= min(length, tokens):
                buckets.add(Bucket(1, query, blocks))
    return sorted(buckets)


def _decodes(limits: Limits, sizes: Range, batch_step: int, block_step: int) -> list[Bucket]:
    longest = ceil(limits.max_length / limits.block_size)
    most = min(longest * limits.max_requests, limits.cache_blocks * REFERENCES)
    batches = sizes(1, batch_step, limits.max_requests, ceil(log2(limits.max_requests)) + 1)
    contexts = sizes(1, block_step, most, ceil(log2(most)) + 1)
    return sorted(
        {Bucket(batch, 1, min(blocks, batch * longest)) for batch in batches for blocks in contexts if batch <= blocks}
    )


def first_cover(buckets: list[Bucket], step: Bucket) -> Bucket | None:
    """The bucket that vLLM-Gaudi runs a step in; `buckets` are sorted."""
    return next((bucket for bucket in buckets if bucket.covers(step)), None)
