"""Which register tiles a matrix product can use, and which it uses by default for how many tokens."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from ..family import Config, Variant
from ..lossless_panels import GROUP, LosslessPanels
from .matmul_weights import panel_count
from .matmul_words import Words, serves_dtypes

# More panels than this do not pay: a block would leave the L2 cache.  More rows only fit with a single panel.
MAX_PANELS = 4
MAX_ROWS = 12
# Weight vectors to have on their way: 8 KiB of them hide 200 ns at 40 GB/s, what one core of a server reads.
IN_FLIGHT = 128
# Unpacking takes registers too: tiles of more rows than this take no more panels than that (measured on a Zen 4).
UNPACKED_ROWS, UNPACKED_PANELS = 4, 2


def serves(spec: OpSpec, target: Target, gated: bool, lossless: bool) -> bool:
    """True if there are kernels for these dtypes, and for weights of this size if they are to be lossless."""
    if not lossless:
        return serves_dtypes(spec)
    N, K = spec.input("weight").sizes()
    fits = LosslessPanels(target.vector_lanes, gated).serves(N, K)
    return fits and serves_dtypes(spec) and spec.input("weight").dtype == "bfloat16"


def _shapes(spec: OpSpec, target: Target, gated: bool) -> list[tuple[int, int]]:
    """(rows, panels) of every tile whose sums and operands fit the vector registers."""
    words = Words.of(target, spec.input("x").dtype)
    registers = 32 if target.vector_lanes == 16 else 16
    step = 2 if gated else 1

    def fits(rows: int, panels: int) -> bool:
        # A vector for each panel's weights and one for a row's x; widened, two for each and one for a mask.
        operands = 2 * (panels + 1) + 1 if words.widened else panels + 1
        return rows * panels <= registers * 3 // 4 and rows * panels + operands <= registers

    panels = range(step, min(panel_count(spec, target, gated), MAX_PANELS) + 1, step)
    return [(r, p) for r in range(1, MAX_ROWS + 1) for p in panels if fits(r, p)]


def _pass_words(spec: OpSpec, target: Target, panels: int) -> int:
    """Words of K of a pass: half of the L2 cache for its weights, the other half for x, the sums and what is
    prefetched."""
    words = Words.of(target, spec.input("x").dtype)
    whole, word_bytes = spec.input("x").size(-1) // words.size, panels * words.vectors.lanes * 4
    passes = max(1, -(-whole * word_bytes // (target.l2_bytes // 2)))
    return -(-whole // passes // GROUP) * GROUP


def _config(rows: int, panels: int, in_flight: int, words: int, lossless: bool, cached: bool) -> Config:
    """`rows` of x and `panels` of weights, `words` of K a pass; weights are asked for `prefetch` words early.

    `lossless` weights are unpacked into registers, or into the cache if `cached`.
    """
    return {
        "rows": rows,
        "panels": panels,
        "words": words,
        "prefetch": in_flight // panels,
        "lossless": lossless,
        "cached": cached,
    }


def space(spec: OpSpec, target: Target, gated: bool, lossless: bool) -> list[Config]:
    """Every tile, with several distances of prefetching."""
    tiles = _shapes(spec, target, gated)
    return [config for tile in tiles for config in _configs(spec, target, *tile, lossless)]


def _configs(spec: OpSpec, target: Target, rows: int, panels: int, lossless: bool) -> list[Config]:
    """Those of one tile."""
    distances = (0, IN_FLIGHT // 2, IN_FLIGHT, IN_FLIGHT * 2)
    words = _pass_words(spec, target, panels)
    return [
        _config(rows, panels, distance, words, lossless, cached)
        for cached in ((False, True) if lossless else (False,))
        for distance in distances
    ]


def admits(spec: OpSpec, config: Config, min_tokens: int, target: Target, gated: bool, lossless: bool) -> bool:
    """True for a tile of the space that needs no more rows than there are tokens."""
    tile = rows, panels = config.get("rows", 0), config.get("panels", 0)
    if tile not in _shapes(spec, target, gated) or rows > min_tokens:
        return False
    return config in _configs(spec, target, rows, panels, lossless)


def default_variants(spec: OpSpec, target: Target, gated: bool, lossless: bool) -> Sequence[Variant]:
    """For few tokens the fewest tiles, evenly filled; for many the tile with the least to load."""
    shapes = sorted(_shapes(spec, target, gated))
    # rows -> most panels; with a single panel each load would serve one multiply-add only.
    widest = {rows: panels for rows, panels in shapes if panels >= min(2, max(p for _, p in shapes))}
    most = max(widest)

    def loads(rows: int) -> tuple[float, int]:
        # Per multiply-add; a vector of weights, from the L2 cache, counts twice, a word of x from L1 once.
        return (rows + 2 * widest[rows]) / (rows * widest[rows]), -rows

    def rows_for(tokens: int) -> int:
        tiles = -(-tokens // most)
        return -(-tokens // tiles) if tiles <= 2 else min(widest, key=loads)

    variants: list[Variant] = []
    for tokens in range(1, 2 * most + 2):
        rows = rows_for(tokens)
        # A single row leaves so much time between its loads that the hardware's own prefetching does better.
        in_flight = 0 if rows == 1 else IN_FLIGHT
        # Two tiles unpack sooner into registers, each for itself, than once into the cache.
        cached = lossless and tokens > 2 * most
        narrow = lossless and not cached and rows > UNPACKED_ROWS
        panels = min(widest[rows], UNPACKED_PANELS) if narrow else widest[rows]
        config = _config(rows, panels, in_flight, _pass_words(spec, target, panels), lossless, cached)
        if not variants or variants[-1].config != config:
            variants.append(Variant(tokens, config))
    return variants
