"""Where a matrix product's weights come from: panels as they are stored, or unpacked from 12 bits into the cache.

A block is some neighbouring panels over a part of K, read for one tile of rows after the other.  Plain panels are
read where they lie.  Lossless ones are unpacked first, every bit restored, so that all that follows is the same.

Roofline of unpacking: 48 bytes are read for 64, 20 vector instructions a group of four vectors of words, 5 a vector.
A core that reads 20 GB/s at 3.5 GHz takes 8 cycles for the 48 bytes of a vector: time is left to multiply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import DTYPE_BYTES, OpSpec, TensorSpec
from vllm_compile.targets import Target

from ..family import Config
from ..layouts import Layout, Panels
from ..lossless_panels import GROUP, SPAN, LosslessPanels, spans
from .matmul_words import Words
from .vectors import Vectors, prefetch, scratch

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
    """Panels of the weight."""
    halves, N = 2 if gated else 1, spec.input("weight").size(0)
    return halves * -(-N // halves // target.vector_lanes)


@dataclass(frozen=True)
class Block:
    """Weights: word k (of all K) of the block's panel p is the vector at `starts[p] + k * lanes`."""

    words: tirx.Buffer
    starts: list[tirx.Expr]


class Weights(Protocol):
    """The weights of one call."""

    def block(self, panel: tirx.Expr, begin: tirx.Expr, end: tirx.Expr) -> Block:
        """Panels from `panel` on, words from `begin` to `end`, ready to be read."""


@dataclass(frozen=True)
class PlainWeights:
    """`panels` panels of `length` words at a time, stored one after the other."""

    stored: tirx.Buffer
    vectors: Vectors
    panels: int
    length: int

    def block(self, panel: tirx.Expr, begin: tirx.Expr, end: tirx.Expr) -> Block:
        step = self.length * self.vectors.lanes
        return Block(self.stored, [T.Bind((panel + p) * step) for p in range(self.panels)])


@dataclass(frozen=True)
class LosslessWeights:
    """`panels` panels of LosslessPanels [N, K] at a time, at most `longest` words of K, unpacked into the cache.

    `stored` is all of it as uint32.  Reads ahead `prefetch` vectors of each panel.
    """

    stored: tirx.Buffer
    vectors: Vectors
    panels: int
    N: int
    K: int
    longest: int
    prefetch: int

    def block(self, panel: tirx.Expr, begin: tirx.Expr, end: tirx.Expr) -> Block:
        """See `Weights`; `begin` is the start of a span."""
        lanes = self.vectors.lanes
        stride = (self.longest + 1) * lanes  # one more: panels 4 KiB apart would compete for the same lines of L1
        unpacked = scratch(self.panels * stride, "uint32")
        with T.serial(0, T.int64(self.panels)) as p:
            start = T.Bind(p * stride - begin * lanes)
            self._unpack(unpacked, start, panel + p, T.truncdiv(begin, T.int64(GROUP)), T.truncdiv(end, T.int64(GROUP)))
            self._patch(unpacked, start, panel + p, begin, end)
        starts = [T.Bind(p * stride - begin * lanes) for p in range(self.panels)]
        return Block(T.decl_buffer(unpacked.shape, "int32", data=unpacked.data), starts)

    def _unpack(self, unpacked: tirx.Buffer, start, panel, begin, end) -> None:
        """Groups from `begin` to `end` of a panel, whose word 0 comes to `start`."""
        v, lanes = self.vectors, self.vectors.lanes
        joined = 3 * lanes  # words of a group
        bases_at = self._layout.offsets(self.N, self.K)[0]
        bases = T.Bind(self._halves(v.load(self.stored, bases_at + panel * lanes)))
        panel_at = T.Bind(panel * (self.K // (2 * GROUP) * joined))
        with T.serial(begin, end) as group:
            source = T.Bind(panel_at + group * joined)
            if self.prefetch:
                for line in range(0, joined * 4, 64):
                    prefetch(self.stored, source + (self.prefetch * lanes + line // 4))
            for i, codes in enumerate(self._codes(source)):
                word = self._weights(codes, bases)
                T.buffer_store(unpacked, word, [T.ramp(start + (group * GROUP + i) * lanes, 1, lanes)])

    def _codes(self, source) -> list[tirx.Expr]:
        """The four vectors of codes of a group: `lossless.part`."""
        v = self.vectors
        first, second, third = (T.Bind(v.load(self.stored, source + i * v.lanes)) for i in range(3))

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

    def _weights(self, codes: tirx.Expr, bases: tirx.Expr) -> tirx.Expr:
        """Words of weights from words of codes: bases are added, but to zeros."""
        count = 2 * self.vectors.lanes
        halves = T.Bind(self._halves(codes))
        used = T.bitwise_and(halves, T.broadcast(T.uint16(0x0780), count)) != T.broadcast(T.uint16(0), count)
        return T.reinterpret(f"uint32x{self.vectors.lanes}", T.Select(used, halves + bases, halves))

    def _halves(self, words: tirx.Expr) -> tirx.Expr:
        return T.reinterpret(f"uint16x{2 * self.vectors.lanes}", words)

    def _patch(self, unpacked: tirx.Buffer, start, panel, begin, end) -> None:
        """Put the weights of the side list where they belong."""
        _, first_at, side_at, _ = self._layout.offsets(self.N, self.K)
        weights = T.decl_buffer((2 * unpacked.shape[0],), "uint16", data=unpacked.data)
        counted = T.Bind(first_at + panel * spans(self.K))
        bounds = (T.truncdiv(begin, T.int64(SPAN)), T.truncdiv(end + (SPAN - 1), T.int64(SPAN)))
        first, last = (T.Cast("int64", self.stored[counted + span]) for span in bounds)
        with T.serial(first, last) as entry:
            place = 2 * start + T.Cast("int64", self.stored[side_at + 2 * entry])
            T.buffer_store(weights, T.Cast("uint16", self.stored[side_at + 2 * entry + 1]), [place])

    @property
    def _layout(self) -> LosslessPanels:
        return LosslessPanels(self.vectors.lanes)


def weights_of(tensor: tirx.Buffer, spec: OpSpec, config: Config, target: Target, gated: bool) -> Weights:
    """The weights in `tensor`, for a kernel with this configuration (matmul_tiles.py)."""
    words, (N, K) = Words.of(target, spec.input("x").dtype), spec.input("weight").sizes()
    stored = stored_weight(spec, target, gated, config["lossless"])
    if not config["lossless"]:
        size = DTYPE_BYTES[stored.dtype]
        flat = T.decl_buffer((stored.nbytes() // (size * words.size),), words.type, data=tensor.data, align=size)
        return PlainWeights(flat, words.vectors, config["panels"], -(-K // words.size))
    flat = T.decl_buffer((stored.nbytes() // 4,), "uint32", data=tensor.data, align=4)
    return LosslessWeights(flat, words.vectors, config["panels"], N, K, config["words"], config["prefetch"])
