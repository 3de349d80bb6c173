"""Weights of 12 bits, every bit restored as they are read: into registers, a group of words at a time.

Where there are several tiles of rows, the first one keeps the words in the cache for the others.

Roofline of unpacking: 48 bytes are read for 64, in 21 vector instructions for a group of four vectors of words.  A core
that reads 20 GB/s at 3.5 GHz takes 8 cycles for the 48 bytes of a vector: time is left to multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from ..lossless_panels import GROUP, LosslessPanels
from .matmul_block import Block, Lines, PlainBlock
from .vectors import CACHE_LINE, Vectors, prefetch, scratch

STORED = 0x87FF87FF  # of a word whose free bits hold parts of another


@dataclass(frozen=True)
class LosslessWeights:
    """`panels` panels of LosslessPanels [N, K] at a time; `stored` is all of it as uint32.

    Read `ahead` words early; the words of a block, at most `kept` of K, are kept unpacked; 0 for not at all.
    """

    stored: tirx.Buffer
    vectors: Vectors
    panels: int
    N: int
    K: int
    ahead: int
    kept: int

    def block(self, panel: tirx.Expr, begin: tirx.Expr) -> tuple[Block, Block]:
        """See `Weights`; `begin` is the start of a group."""
        packed = LosslessBlock(self, [T.Bind(panel + p) for p in range(self.panels)])
        if not self.kept:
            return packed, packed
        lanes = self.vectors.lanes
        stride = (self.kept + 1) * lanes  # one more: panels 4 KiB apart would compete for the same lines of L1
        words = scratch(self.panels * stride, "int32")
        starts = [T.Bind(p * stride - begin * lanes) for p in range(self.panels)]
        unpacked = PlainBlock(words, starts, lanes, self.kept, 0)
        return KeptBlock(packed, unpacked), unpacked

    def lines(self, panel: tirx.Expr, begin: tirx.Expr, words: int) -> Lines:
        """See `Weights`; `begin` is the start of a group."""
        group = 3 * self.vectors.lanes  # uint32
        begins = T.Bind(T.truncdiv(begin, T.int64(GROUP)) * group)
        starts = [T.Bind((panel + p) * (self.K // (2 * GROUP) * group) + begins) for p in range(self.panels)]
        return Lines(self.stored, starts, -(-words // GROUP * group * 4 // CACHE_LINE))

    def add_listed(self, panel: tirx.Expr, add: Callable[[int, tirx.Expr, tirx.Expr, tirx.Expr], None]) -> None:
        _, first_at, side_at, _ = self.layout.offsets(self.N, self.K)
        lanes = T.int64(self.vectors.lanes)
        for p in range(self.panels):
            first, last = (T.Cast("int64", self.stored[first_at + panel + p + end]) for end in range(2))
            with T.serial(first, last) as entry:
                place = T.Bind(T.Cast("int64", self.stored[side_at + 2 * entry]))
                value = T.Bind(T.reinterpret("float32", self.stored[side_at + 2 * entry + 1]))
                add(p, T.truncdiv(place, lanes), T.truncmod(place, lanes), value)

    @property
    def layout(self) -> LosslessPanels:
        return LosslessPanels(self.vectors.lanes)


class LosslessBlock:
    """Panels unpacked as they are read."""

    step = GROUP

    def __init__(self, weights: LosslessWeights, panels: list[tirx.Expr]) -> None:
        v, self._weights = weights.vectors, weights
        self._joined = 3 * v.lanes  # uint32 of a group
        bases_at = weights.layout.offsets(weights.N, weights.K)[0]
        self._bases = [T.Bind(self._halves(v.load(weights.stored, bases_at + panel * v.lanes))) for panel in panels]
        length = weights.K // (2 * GROUP) * self._joined
        self._starts = [T.Bind(panel * length) for panel in panels]

    def read(self, panel: int, word: tirx.Expr) -> list[tirx.Expr]:
        start = T.Bind(self._starts[panel] + T.truncdiv(word, T.int64(GROUP)) * self._joined)
        return [T.Bind(self._restored(codes, self._bases[panel])) for codes in self._codes(start)]

    def prefetch(self, word: tirx.Expr) -> None:
        if self._weights.ahead:
            ahead = T.Bind(T.truncdiv(word + self._weights.ahead, T.int64(GROUP)) * self._joined)
            for start in self._starts:
                for line in range(0, self._joined, CACHE_LINE // 4):
                    prefetch(self._weights.stored, start + ahead + line)

    def _codes(self, start: tirx.Expr) -> list[tirx.Expr]:
        """The four vectors of codes of a group: `lossless.part`."""
        v = self._weights.vectors
        first, second, third = (T.Bind(v.load(self._weights.stored, start + i * v.lanes)) for i in range(3))

        def masked(vector: tirx.Expr, mask: int) -> tirx.Expr:
            return T.bitwise_and(vector, v.splat(T.uint32(mask)))

        def right(vector: tirx.Expr, bits: int) -> tirx.Expr:
            return T.shift_right(vector, v.splat(T.uint32(bits)))

        rotated = T.bitwise_or(right(third, 12), T.shift_left(third, v.splat(T.uint32(20))))
        fourth = T.bitwise_or(
            T.bitwise_or(masked(right(first, 4), 0x07800780), masked(right(second, 8), 0x00780078)),
            masked(rotated, 0x80078007),
        )
        return [*(masked(vector, STORED) for vector in (first, second, third)), fourth]

    def _restored(self, codes: tirx.Expr, bases: tirx.Expr) -> tirx.Expr:
        """Words of weights: the bases are added, but to zeros."""
        lanes = self._weights.vectors.lanes
        halves = T.Bind(self._halves(codes))
        used = T.bitwise_and(halves, T.broadcast(T.uint16(0x0780), 2 * lanes)) != T.broadcast(T.uint16(0), 2 * lanes)
        return T.reinterpret(f"int32x{lanes}", T.Select(used, halves + bases, halves))

    def _halves(self, words: tirx.Expr) -> tirx.Expr:
        return T.reinterpret(f"uint16x{2 * self._weights.vectors.lanes}", words)


@dataclass(frozen=True)
class KeptBlock:
    """Panels unpacked as they are read, and written to the block that others read."""

    packed: LosslessBlock
    unpacked: PlainBlock

    step = GROUP

    def read(self, panel: int, word: tirx.Expr) -> list[tirx.Expr]:
        vectors = self.packed.read(panel, word)
        for i, vector in enumerate(vectors):
            self.unpacked.write(panel, word + i, vector)
        return vectors

    def prefetch(self, word: tirx.Expr) -> None:
        self.packed.prefetch(word)
