"""Plans buckets: for a warm-up budget of so many graphs, those with the least padding over a trace's steps.

Bucket plans here are nested: the axis `batch` is cut into ranges, each range's steps along `queries`, and those along
`blocks`.  Among such plans a dynamic program finds the best for every number of graphs at once: the cost of the steps
up to a size with n graphs is the least, over where the last range starts and how many graphs it has, of the cost of
what is before it and of that range on its own.

Traffic changes: a part of the weight (`UNFORESEEN`) is spread over all shapes that the limits allow, evenly in the
logarithm of each size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_compile.errors import BucketError
from vllm_compile.runtime.buckets import Bucket, BucketPlan, Limits, Work

UNFORESEEN = 0.2  # of the weight goes to shapes that no trace foretells
MOST_SIZES = 40  # of each axis that buckets may end at; more make plans hardly better, and slower


@dataclass(frozen=True)
class _Best:
    """For each number of graphs, none at first: the least cost of some steps, and the buckets that reach it."""

    cost: np.ndarray
    buckets: Callable[[int], list[Bucket]]


NOTHING = _Best(np.zeros(1), lambda graphs: [])


def plan_buckets(
    steps: Mapping[Bucket, int], limits: Limits, work: Work, budget: int, unforeseen: float = UNFORESEEN
) -> BucketPlan:
    """At most `budget` buckets, which every step within the limits fits into, for steps that occur so often.

    Raises:
        BucketError: the budget is less than two, or there are no steps.
    """
    # What no other bucket covers runs in the largest there can be.
    largest = limits.largest
    if budget < len(largest):
        raise BucketError(f"a budget of {budget} graphs: there must be one of decodes and one of prompts at least")
    if not steps:
        raise BucketError("no steps to plan for: the trace has no requests")
    weights = {shape: count * (1 - unforeseen) for shape, count in steps.items()}
    if unforeseen:
        spread = _all_shapes(limits)
        for shape in spread:
            weights[shape] = weights.get(shape, 0.0) + unforeseen * sum(steps.values()) / len(spread)
    decodes = _phase({s: n for s, n in weights.items() if s.decodes}, work, budget)
    prompts = _phase({s: n for s, n in weights.items() if not s.decodes}, work, budget)
    both = _combine(decodes, prompts, budget - len(largest))
    reached = int(np.argmin(both.cost))
    chosen = both.buckets(reached) if np.isfinite(both.cost[reached]) else []
    return BucketPlan(tuple(sorted({*chosen, *largest})), work, limits.block_size)


def _all_shapes(limits: Limits) -> list[Bucket]:
    """Shapes within the limits, their sizes powers of two."""
    decode, prompt = limits.largest
    longest = limits.blocks(limits.max_length)
    decodes = [
        Bucket(batch, 1, blocks)
        for batch in _powers(decode.batch)
        for blocks in _powers(decode.blocks)
        if batch <= blocks <= batch * longest
    ]
    contexts = [0, *_powers(prompt.blocks)]
    return [*decodes, *(Bucket(1, 2 * queries, b) for queries in _powers(prompt.queries // 2) for b in contexts)]


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length())]


def _phase(weights: Mapping[Bucket, float], work: Work, budget: int) -> _Best:
    if not weights:
        return NOTHING
    shapes = np.array(sorted(weights), dtype=np.int64)
    counts = np.array([weights[Bucket(*map(int, shape))] for shape in shapes])
    return _nested(_rounded_up(shapes), counts, (), work, budget)


def _rounded_up(shapes: np.ndarray) -> np.ndarray:
    """The shapes with each size one of at most MOST_SIZES: every so many-th of those there are, and the largest."""
    rounded = shapes.copy()
    for axis in range(shapes.shape[1]):
        sizes = np.unique(shapes[:, axis])
        picks = np.unique(np.linspace(0, len(sizes) - 1, min(len(sizes), MOST_SIZES)).round().astype(int))
        ends = sizes[picks]
        rounded[:, axis] = ends[np.searchsorted(ends, shapes[:, axis])]
    return rounded


def _nested(shapes: np.ndarray, counts: np.ndarray, outer: tuple[int, ...], work: Work, budget: int) -> _Best:
    """The best ways to cover steps whose first axes are those of `outer`, in up to `budget` buckets."""
    axis = len(outer)
    sizes, place = np.unique(shapes[:, axis], return_inverse=True)
    if axis == shapes.shape[1] - 1:
        return _last_axis(sizes, np.bincount(place, counts), outer, work, budget)
    best = [NOTHING]
    for end, size in enumerate(map(int, sizes)):
        ways = []
        for begin in range(end + 1):
            inside = (place >= begin) & (place <= end)
            last = _nested(shapes[inside], counts[inside], (*outer, size), work, budget)
            ways.append(_combine(best[begin], last, budget))
        best.append(_least(ways))
    return best[-1]


def _last_axis(sizes: np.ndarray, counts: np.ndarray, outer: tuple[int, ...], work: Work, budget: int) -> _Best:
    """The same on the last axis: a bucket for each range of sizes."""
    count = len(sizes)
    buckets = [Bucket(*outer, int(size)) for size in sizes]
    before = np.concatenate([[0.0], np.cumsum(counts)])
    each = np.array([work.of(bucket) for bucket in buckets])
    span = (before[None, 1:] - before[:-1, None]) * each  # [first, last] sizes of a range
    span[np.tril_indices(count, -1)] = np.inf
    cost = [np.concatenate([[0.0], np.full(count, np.inf)])]
    begins = []
    for _ in range(min(count, budget)):
        ways = cost[-1][:count, None] + span
        begins.append(ways.argmin(axis=0))
        cost.append(np.concatenate([[np.inf], ways.min(axis=0)]))

    def chosen(graphs: int) -> list[Bucket]:
        found, end = [], count
        for n in range(graphs, 0, -1):
            found.append(buckets[end - 1])
            end = int(begins[n - 1][end - 1])
        return found

    return _Best(np.array([row[count] for row in cost]), chosen)


def _combine(first: _Best, second: _Best, budget: int) -> _Best:
    """Both covered, with every split of the graphs between them."""
    length = min(len(first.cost) + len(second.cost) - 1, budget + 1)
    cost, split = np.full(length, np.inf), np.zeros(length, dtype=int)
    for graphs in range(min(len(second.cost), length)):
        reach = min(len(first.cost), length - graphs)
        sums, here = first.cost[:reach] + second.cost[graphs], slice(graphs, graphs + reach)
        split[here] = np.where(sums < cost[here], graphs, split[here])
        cost[here] = np.minimum(sums, cost[here])
    return _Best(cost, lambda n: first.buckets(n - int(split[n])) + second.buckets(int(split[n])))


def _least(ways: Sequence[_Best]) -> _Best:
    """The best of several ways for each number of graphs."""
    table = np.full((len(ways), max(len(way.cost) for way in ways)), np.inf)
    for row, way in zip(table, ways, strict=True):
        row[: len(way.cost)] = way.cost
    best = table.argmin(axis=0)
    return _Best(table.min(axis=0), lambda n: ways[int(best[n])].buckets(n))
