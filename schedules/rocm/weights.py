"""How products (product.py) read a weight matrix: tiles of 16 rows, 64 columns at a time, plain or lossless.

Plain: a lane has 16 neighbours of its row, 32 bytes.  Lossless (`vllm_compile/lossless.py`): blocks are laid out for
32 lanes, each with 8 columns of two rows in both halves of the block.  So the lanes of a wave take two tiles at once,
rows 0 to 7 of the matrix instruction those of one tile, rows 8 to 15 those of the other; a lane's three vectors of 16
bytes are the operands of two such products, of the upper and of the lower halves of the tiles.  Nine bit operations
restore eight weights, which are bf16 numbers with exponent fields 0 to 15.  Some 13 more add 64 to the fields, but for
those of zeros, so that products do not come near float32's denormals; each row's scale is applied to its sum.

What lies outside a row's window of exponents stands in a side list: its products are added to the sum in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from vllm_compile import lossless

from .norm import ALIGN, VECTOR

TILE = 16  # rows, and tokens, of an MFMA
BLOCK = 64  # columns that a wave takes at a time
OWN = BLOCK // 4  # of a lane, of each row or token of its
WORDS = 4  # of 32 bits, of a vector of 16 bytes
PACKED_BLOCK = lossless.WORDS  # words of a lossless block
RUN = PACKED_BLOCK // 3  # of them that are the lanes' first vectors
STORED = 0x87FF87FF  # bits of two weights' codes: sign, low half of the exponent, mantissa
EXPONENTS, LEAST = 0x07800780, 0x0080  # bits of their exponents; of the least but 0, in 16 bits
TO_BIAS = 6  # left by so many, that is 64 of an exponent field
assert LEAST << TO_BIAS == lossless.SCALE_BIAS << lossless.MANTISSA_BITS
ENTRIES = 4  # of the side list, requested together

REGISTERS = {False: OWN // 2, True: 6}  # of a lane, of a tile's block, plain or packed
UNPACKED = 44  # vector instructions of a lane that restore a tile's block
SIDE_ROUNDS = 3  # of loads: a row's header, its entries, their x


@dataclass(frozen=True)
class Place:
    """Where a lane stands: its row and token of a tile, and its quarter of a block's columns."""

    at: Any
    quarter: Any


def bits(name: str, tensors: dict[str, tirx.Buffer], size: Any, dtype: str = "uint16") -> tirx.Buffer:
    """A tensor in one dimension, of bf16 as what the matrix cores take, or of packed weights as words."""
    return IRBuilder.name(name, T.decl_buffer((size,), dtype, data=tensors[name].data, align=ALIGN))


def store(buffer: Any, start: Any, value: Any, lanes: int) -> None:
    T.buffer_store(buffer, value, [T.ramp(start, 1, lanes)])


@dataclass(frozen=True)
class Plain:
    """A weight as PyTorch has it; `first_rows` are those of the thread block's tiles."""

    weight: tirx.Buffer
    K: int
    place: Place
    starts: Sequence[Any]
    loaded: tirx.Buffer

    @staticmethod
    def of(weight: tirx.Buffer, N: int, K: int, place: Place, first_rows: Sequence[Any], steps: int) -> Plain:
        """Rows that a last tile lacks are read as row N - 1."""
        rows = [row + place.at if N % TILE == 0 else T.min(row + place.at, N - 1) for row in first_rows]
        starts = [T.Bind(T.Cast("int64", row) * K + place.quarter * OWN) for row in rows]
        loaded = T.alloc_buffer((steps * len(starts) * OWN,), "uint16", scope="local")
        return Plain(weight, K, place, starts, IRBuilder.name("a", loaded))

    def column(self, vector: int) -> Any:
        """Of a block: the first of a lane's columns that its vector of x has."""
        return self.place.quarter * OWN + vector * VECTOR

    def load(self, step: int, block: Any) -> None:
        for tile, start in enumerate(self.starts):
            for v in range(OWN // VECTOR):
                values = self.weight.vload([start + block * BLOCK + v * VECTOR], f"uint16x{VECTOR}")
                store(self.loaded, (step * len(self.starts) + tile) * OWN + v * VECTOR, values, VECTOR)

    def unpack(self, step: int) -> None:
        """Nothing to do."""

    def operand(self, step: int, tile: int, i: int) -> Any:
        return self.loaded.vload([(step * len(self.starts) + tile) * OWN + i * 4], "uint16x4")

    def sum_of(self, tile: Any) -> tuple[Any, Any]:
        """Where four rows' sums of a tile are, from row 4 * quarter on: which product's, and which lane's."""
        return tile, self.place.quarter * TILE + self.place.at


@dataclass(frozen=True)
class Packed:
    """A lossless weight: pairs of tiles, `first_rows` of both one after the other.

    Product 2 * p + j is of pair p: rows 8 * j to 8 * j + 7 of its first tile, then of its second.
    """

    words: tirx.Buffer
    place: Place
    starts: Sequence[Any]
    loaded: tirx.Buffer
    unpacked: tirx.Buffer

    @staticmethod
    def of(words: tirx.Buffer, N: int, K: int, place: Place, first_rows: Sequence[Any], steps: int) -> Packed:
        lane = place.at % 8 * 4 + place.quarter  # of the 32 that the layout is for
        starts = []
        for first, second in zip(first_rows[::2], first_rows[1::2], strict=True):
            row = T.if_then_else(place.at < 8, first, second)
            starts.append(T.Bind(T.Cast("int64", row) * (K * PACKED_BLOCK // BLOCK // TILE) + lane * WORDS))
        loaded = T.alloc_buffer((steps * len(starts) * 3 * WORDS,), "uint32", scope="local")
        unpacked = T.alloc_buffer((len(first_rows) * OWN // 2,), "uint32", scope="local")
        return Packed(words, place, starts, IRBuilder.name("a", loaded), IRBuilder.name("unpacked", unpacked))

    def column(self, vector: int) -> Any:
        return vector * (BLOCK // 2) + self.place.quarter * VECTOR

    def load(self, step: int, block: Any) -> None:
        for pair, start in enumerate(self.starts):
            for v in range(3):
                values = self.words.vload([start + T.Cast("int64", block) * PACKED_BLOCK + v * RUN], "uint32x4")
                store(self.loaded, ((step * len(self.starts) + pair) * 3 + v) * WORDS, values, WORDS)

    def unpack(self, step: int) -> None:
        """The inverse of `lossless.join`, of four words at once, times 2 ** 64."""

        def all_of(value: int) -> Any:
            return T.broadcast(T.uint32(value), WORDS)

        def right(value: Any, by: int, mask: int) -> Any:
            return T.bitwise_and(T.shift_right(value, all_of(by)), all_of(mask))

        for pair in range(len(self.starts)):
            at = (step * len(self.starts) + pair) * 3 * WORDS
            first, second, third = (self.loaded.vload([at + v * WORDS], "uint32x4") for v in range(3))
            rotated = T.bitwise_or(T.shift_right(third, all_of(12)), T.shift_left(third, all_of(20)))
            fourth = T.bitwise_or(right(first, 4, 0x07800780), right(second, 8, 0x00780078))
            fourth = T.bitwise_or(fourth, T.bitwise_and(rotated, all_of(0x80078007)))
            runs = (*(T.bitwise_and(run, all_of(STORED)) for run in (first, second, third)), fourth)
            for run, value in enumerate(runs):  # half 0 of rows g and g + 8, then half 1
                to = ((pair * 2 + run % 2) * 2 + run // 2) * WORDS
                store(self.unpacked, to, value, WORDS)
                codes = self.unpacked.vload([to], "uint32x4")
                fields = T.reinterpret("uint16x8", T.bitwise_and(codes, all_of(EXPONENTS)))
                least = T.reinterpret("uint32x4", T.min(fields, T.broadcast(T.uint16(LEAST), 2 * WORDS)))
                store(self.unpacked, to, T.bitwise_or(codes, T.shift_left(least, all_of(TO_BIAS))), WORDS)

    def operand(self, step: int, tile: int, i: int) -> Any:
        return T.reinterpret("uint16x4", self.unpacked.vload([tile * OWN // 2 + i * 2], "uint32x2"))

    def sum_of(self, tile: Any) -> tuple[Any, Any]:
        quarter = self.place.quarter
        return tile // 2 * 2 + quarter // 2, (quarter % 2 + tile % 2 * 2) * TILE + self.place.at


def as_float32(x: Any) -> Any:
    """The bits of a bf16 number, as float32."""
    return T.reinterpret("float32", T.shift_left(T.Cast("uint32", x), T.uint32(16)))


@dataclass(frozen=True)
class SideList:
    """Scales of the rows of a thread block, and what their side entries add for its tokens: in LDS, from `at` on."""

    words: tirx.Buffer
    N: int
    K: int
    shared: tirx.Buffer
    at: int
    rows: int
    tokens: int

    @staticmethod
    def lds_floats(rows: int, tokens: int) -> int:
        return rows * (1 + tokens)

    def prepare(self, thread: Any, threads: int, row_of: Callable[[Any], Any], x_of: Callable[[Any, Any], Any]) -> None:
        """Read them: `row_of(i)` is the row of the weight, `x_of(token, k)` x in float32.

        A thread has some tokens of a row.  Entries are requested together, and then x of all of the thread's tokens.
        """
        header, side = (offset // 4 for offset in lossless.offsets(self.N, self.K)[:2])
        apart = max(threads // self.rows, 1)  # threads that share a row
        own = -(-self.tokens // apart)
        totals = IRBuilder.name("side_totals", T.alloc_buffer((own,), "float32", scope="local"))
        places = IRBuilder.name("side_places", T.alloc_buffer((ENTRIES,), "int32", scope="local"))
        values = IRBuilder.name("side_values", T.alloc_buffer((ENTRIES,), "float32", scope="local"))
        with T.serial(-(-self.rows * apart // threads)) as turn:
            item = T.Bind(turn * threads + thread)
            i, token = T.Bind(item % self.rows), T.Bind(item // self.rows)
            row = T.Bind(T.Cast("int64", row_of(i)))
            first = T.Bind(T.Cast("int32", self.words[header + 2 * row]))
            scale = T.Bind(T.reinterpret("float32", self.words[header + 2 * row + 1]))
            last = T.Bind(T.Cast("int32", self.words[header + 2 * row + 2]))
            for o in range(own):
                T.buffer_store(totals, T.float32(0), [o])
            with T.serial(T.truncdiv(last - first + ENTRIES - 1, ENTRIES)) as group:
                for e in range(ENTRIES):
                    entry = side + 2 * T.Cast("int64", T.min(first + group * ENTRIES + e, last - 1))
                    T.buffer_store(places, T.Cast("int32", self.words[entry]), [e])
                    T.buffer_store(values, T.reinterpret("float32", self.words[entry + 1]), [e])
                for e, o in product(range(ENTRIES), range(own)):
                    listed = first + group * ENTRIES + e < last
                    term = values[e] * x_of(token + o * apart, places[e])
                    T.buffer_store(totals, totals[o] + T.if_then_else(listed, term, T.float32(0)), [o])
            for o in range(own):
                with T.If(tirx.all(token < apart, token + o * apart < self.tokens)), T.Then():
                    at = self.at + self.rows + (token + o * apart) * self.rows + i
                    T.buffer_store(self.shared, totals[o], [at])
            with T.If(token == 0), T.Then():
                T.buffer_store(self.shared, scale, [self.at + i])

    def complete(self, total: Any, i: Any, token: Any) -> Any:
        """The sum of products of row i of the thread block, from that of its codes."""
        return total * self.shared[self.at + i] + self.shared[self.at + self.rows + token * self.rows + i]
