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
# Tokens are one tile of rows up to this; more of them lie a power of two apart too often, and push each other out of
# the eight ways of the L1 cache.
SINGLE_ROWS = 10
# Many tokens are tiles of so many rows: few enough for that, and to leave few rows over (measured on a Zen 4: with 32
# tokens 10 % faster than six rows, at most 3 % slower than eight).
MANY_ROWS = 4
# Unpacking takes registers too: tiles of more rows than this, or whose words are kept, take no more panels than that
# (measured on a Zen 4).
UNPACKED_ROWS, UNPACKED_PANELS = 4, 2
# A single row leaves so much time between its loads that the hardware's own prefetching does better; unpacking leaves
# as much to so many (measured on a Zen 4, 5 to 30 % for 2 and 3 rows of all layers of Llama-3.2-1B).
UNHURRIED_ROWS = 3


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
        # A vector for each panel's weights and one for a row's x; widened, two for each and one for a mask.  (Lossless
        # weights come four vectors at a time: UNPACKED_PANELS.)
        operands = 2 * (panels + 1) + 1 if words.widened else panels + 1
        return rows * panels <= registers * 3 // 4 and rows * panels + operands <= registers

    panels = range(step, min(panel_count(spec, target, gated), MAX_PANELS) + 1, step)
    return [(r, p) for r in range(1, MAX_ROWS + 1) for p in panels if fits(r, p)]


def _pass_words(spec: OpSpec, target: Target, panels: int, many: bool) -> int:
    """Words of K of a pass: half of the L2 cache for its weights, and for the next one's if they are asked for, the
    other half for x and the sums."""
    words = Words.of(target, spec.input("x").dtype)
    whole, word_bytes = spec.input("x").size(-1) // words.size, panels * words.vectors.lanes * 4
    passes = max(1, -(-whole * word_bytes // (target.l2_bytes // (4 if many else 2))))
    return -(-whole // passes // GROUP) * GROUP


def _config(rows: int, panels: int, in_flight: int, words: int, lossless: bool, many: bool) -> Config:
    """`rows` of x and `panels` of weights, `words` of K a pass; weights are asked for `prefetch` words early.

    With `many` tiles of rows the first one keeps lossless weights unpacked, and the others ask for the next block.
    """
    return {
        "rows": rows,
        "panels": panels,
        "words": words,
        "prefetch": in_flight // panels,
        "lossless": lossless,
        "many": many,
    }


def space(spec: OpSpec, target: Target, gated: bool, lossless: bool) -> list[Config]:
    """Every tile, with several distances of prefetching."""
    tiles = _shapes(spec, target, gated)
    return [config for tile in tiles for config in _configs(spec, target, *tile, lossless)]


def _configs(spec: OpSpec, target: Target, rows: int, panels: int, lossless: bool) -> list[Config]:
    """Those of one tile."""
    distances = (0, IN_FLIGHT // 2, IN_FLIGHT, IN_FLIGHT * 2)
    return [
        _config(rows, panels, distance, _pass_words(spec, target, panels, many), lossless, many)
        for many in (False, True)
        for distance in distances
    ]


def admits(spec: OpSpec, config: Config, min_tokens: int, target: Target, gated: bool, lossless: bool) -> bool:
    """True for a tile of the space that needs no more rows than there are tokens."""
    tile = rows, panels = config.get("rows", 0), config.get("panels", 0)
    if tile not in _shapes(spec, target, gated) or rows > min_tokens:
        return False
    return config in _configs(spec, target, rows, panels, lossless)


def default_variants(spec: OpSpec, target: Target, gated: bool, lossless: bool) -> Sequence[Variant]:
    """For few tokens a tile of as many rows, with as many panels as there are registers; for more, tiles of a few."""
    shapes = sorted(_shapes(spec, target, gated))
    # rows -> most panels; with a single panel each load would serve one multiply-add only.
    widest = {rows: panels for rows, panels in shapes if panels >= min(2, max(p for _, p in shapes))}
    single = min(SINGLE_ROWS, max(widest))

    def variant(tokens: int) -> Variant:
        many = tokens > single
        rows = min(MANY_ROWS, single) if many else tokens
        in_flight = 0 if rows <= (UNHURRIED_ROWS if lossless else 1) else IN_FLIGHT
        narrow = lossless and (many or rows > UNPACKED_ROWS)
        panels = min(widest[rows], UNPACKED_PANELS) if narrow else widest[rows]
        words = _pass_words(spec, target, panels, many)
        return Variant(tokens, _config(rows, panels, in_flight, words, lossless, many))

    return [variant(tokens) for tokens in range(1, single + 2)]
