"""Where a matrix product's weights come from: panels as they are stored, or unpacked (matmul_lossless.py).

A block is some neighbouring panels over a part of K, read for one tile of rows after the other.  The first tile's reads
come from memory.  The others', which do not, leave time to ask for the block that comes next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tvm import tirx
from tvm.script import tirx as T

from .vectors import CACHE_LINE, prefetch


class Block(Protocol):
    """Some panels' words of K, ready to be read."""

    @property
    def step(self) -> int:
        """Words of K that are read together."""

    def read(self, panel: int, word: tirx.Expr) -> list[tirx.Expr]:
        """Of one of its panels, `step` vectors: words of K from `word` on."""

    def prefetch(self, word: tirx.Expr) -> None:
        """Ask for what will be read some time after `word`."""


@dataclass(frozen=True)
class Lines:
    """A block in memory: `count` cache lines of each panel, from `starts` on, of values of 4 bytes."""

    stored: tirx.Buffer
    starts: list[tirx.Expr]
    count: int

    def prefetch(self, line: tirx.Expr) -> None:
        """Ask for a line of each panel to be brought into the L2 cache."""
        at = T.Bind(line * (CACHE_LINE // 4))
        for start in self.starts:
            prefetch(self.stored, start + at, l2=True)


class Weights(Protocol):
    """The weights of one call."""

    def block(self, panel: tirx.Expr, begin: tirx.Expr) -> tuple[Block, Block]:
        """Panels from `panel` on, words of K from `begin` on: as the first tile of rows reads them, and the others."""

    def lines(self, panel: tirx.Expr, begin: tirx.Expr, words: int) -> Lines:
        """The same panels as they lie in memory, `words` words of K."""

    def add_listed(self, panel: tirx.Expr, add: Callable[[int, tirx.Expr, tirx.Expr, tirx.Expr], None]) -> None:
        """Call add(panel of the block, k, lane, float32 weight) for each weight that `Block.read` gave as zero."""


@dataclass(frozen=True)
class PlainBlock:
    """Word k (of all K) of panel p is the vector at `starts[p] + k * lanes`; each has `length` words.

    `prefetch` is asked for `ahead` words early, 0 for not at all.
    """

    words: tirx.Buffer
    starts: list[tirx.Expr]
    lanes: int
    length: int
    ahead: int
    step: int = 1

    def read(self, panel: int, word: tirx.Expr) -> list[tirx.Expr]:
        return [self.words.vload([self.starts[panel] + word * self.lanes], f"{self.words.dtype}x{self.lanes}")]

    def write(self, panel: int, word: tirx.Expr, vector: tirx.Expr) -> None:
        """Let the vector be what is read there."""
        T.buffer_store(self.words, vector, [T.ramp(self.starts[panel] + word * self.lanes, 1, self.lanes)])

    def prefetch(self, word: tirx.Expr) -> None:
        if self.ahead:
            # Past the end of its panel a stream goes on in the next block.
            skip = T.Select(word + self.ahead < self.length, T.int64(0), T.int64((len(self.starts) - 1) * self.length))
            ahead = T.Bind((self.ahead + word + skip) * self.lanes)
            for start in self.starts:
                prefetch(self.words, start + ahead)


@dataclass(frozen=True)
class PlainWeights:
    """`panels` panels of `length` words at a time, stored one after the other; asked for `ahead` words early."""

    stored: tirx.Buffer
    lanes: int
    panels: int
    length: int
    ahead: int

    def block(self, panel: tirx.Expr, begin: tirx.Expr) -> tuple[Block, Block]:
        starts = [T.Bind((panel + p) * (self.length * self.lanes)) for p in range(self.panels)]
        block = PlainBlock(self.stored, starts, self.lanes, self.length, self.ahead)
        return block, block

    def lines(self, panel: tirx.Expr, begin: tirx.Expr, words: int) -> Lines:
        starts = [T.Bind(((panel + p) * self.length + begin) * self.lanes) for p in range(self.panels)]
        return Lines(self.stored, starts, -(-words * self.lanes * 4 // CACHE_LINE))

    def add_listed(self, panel: tirx.Expr, add: Callable[[int, tirx.Expr, tirx.Expr, tirx.Expr], None]) -> None:
        """None is."""
