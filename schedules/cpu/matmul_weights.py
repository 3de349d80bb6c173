"""Where a matrix product's weights come from: panels as they are stored, or of 12 bits, every bit restored.

A block is some neighbouring panels over a part of K, read for one tile of rows after the other.  Lossless panels are
unpacked into registers, a group of words at a time; where there are several tiles, the first one keeps the words in the
cache for the others.  Those, which read nothing from memory, ask for the block that comes next.

Roofline of unpacking: 48 bytes are read for 64, in 23 vector instructions for a group of four vectors of words.  A core
that reads 20 GB/s at 3.5 GHz takes 8 cycles for the 48 bytes of a vector: time is left to multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import DTYPE_BYTES, OpSpec, TensorSpec
from vllm_compile.targets import Target

from ..family import Config
from ..layouts import Layout, Panels
from ..lossless_panels import GROUP, LosslessPanels
from .matmul_words import Words
from .vectors import CACHE_LINE, Vectors, prefetch, scratch

STORED = 0x87FF87FF  # of a word whose free bits hold parts of another


def weight_layout(spec: OpSpec, target: Target, gated: bool, lossless: bool) -> Layout:
    """The layout that every variant reads: a vector of words for each step along K."""
    if lossless:
        return LosslessPanels(target.vector_lanes, gated)
    return Panels(target.vector_lanes, Words.of(target, spec.input("x").dtype).size, gated)


def stored_weight(spec: OpSpec, target: Target, gated: bool, lossless: bool) -> TensorSpec:
    """The weight as it is stored."""
    layout, plain = weight_layout(spec, target, gated, lossless), spec.input("weight")
    return TensorSpec(layout.shape(tuple(plain.sizes())), layout.dtype(plain.dtype))


def panel_count(spec: OpSpec, target: Target, gated: bool) -> int:
    """Panels of the weight; of one expert's, if there are several."""
    halves, N = 2 if gated else 1, spec.input("weight").size(-2)
    return halves * -(-N // halves // target.vector_lanes)


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


def weights_of(tensor: tirx.Buffer, spec: OpSpec, config: Config, target: Target, gated: bool) -> Weights:
    """The weights in `tensor`, for a kernel with this configuration (matmul_tiles.py)."""
    words, (N, K) = Words.of(target, spec.input("x").dtype), spec.input("weight").sizes()[-2:]
    lanes, panels, ahead = words.vectors.lanes, config["panels"], config["prefetch"]
    stored = stored_weight(spec, target, gated, config["lossless"])
    if config["lossless"]:
        flat = T.decl_buffer((stored.nbytes() // 4,), "uint32", data=tensor.data, align=4)
        return LosslessWeights(flat, words.vectors, panels, N, K, ahead, config["words"] if config["many"] else 0)
    size = DTYPE_BYTES[stored.dtype]
    flat = T.decl_buffer((stored.nbytes() // (size * words.size),), words.type, data=tensor.data, align=size)
    return PlainWeights(flat, lanes, panels, -(-K // words.size), ahead)
