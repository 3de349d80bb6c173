"""The paged cache as a sequence of tiles of words, the same for every query that reads it.

A tile is at most `tile` consecutive cached tokens of one block, counted from the block's first token: where
tiles begin depends on the position in the sequence alone, never on who asks, and so does the order in which
an online softmax adds them up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from ..vector_math import exp
from .vectors import CACHE_LINE, Vectors, prefetch, scratch

NEVER = -1e30  # below every score; finite, so that a difference of two is not NaN


def settled(value: tirx.Expr) -> tirx.Var:
    """A variable of this value, of which TVM's simplifier knows no more: else it would reason about it at each use."""
    register = T.alloc_buffer((1,), str(value.ty.dtype))
    T.buffer_store(register, value, [0])
    return T.Bind(register[0])


def row_index(m, rows, first_row, heads: int, group: int) -> tirx.Expr:
    """Row of q [T*H, D] that is row m of an item, heads fastest; rows past the end repeat the last."""
    inside = T.min(m, rows - 1)
    return first_row + T.Cast("int64", inside // group) * heads + inside % group


@dataclass(frozen=True)
class Scores:
    """What becomes of a product of a query and a key: scaled, maybe soft-capped, seen within a window; 0 is none."""

    scale: float
    window: int = 0
    soft_cap: float = 0.0

    def weight(self, v: Vectors, score: tirx.Expr, top: tirx.Expr) -> tirx.Expr:
        """exp(score - top) of vectors of scaled products; both are capped here, which keeps their order."""
        if not self.soft_cap:
            return exp(score - top)
        score = v.load(v.register(score))
        difference = v.register(self._capped(v, score) - self._capped(v, top))
        return T.Select(score < v.splat(NEVER / 2), v.splat(0.0), exp(v.load(difference)))

    def _capped(self, v: Vectors, score: tirx.Expr) -> tirx.Expr:
        """Its steps are stored: TVM would put each into the next, again and again."""
        power = v.register(exp(score * v.splat(2 / self.soft_cap)))
        tanh = v.splat(1.0) - v.splat(2.0) / (v.load(power) + v.splat(1.0))
        return v.load(v.register(tanh * v.splat(float(self.soft_cap))))

    def first(self, position) -> tirx.Expr:
        """The first position that a query at `position` sees."""
        return T.max(position - (self.window - 1), 0) if self.window else T.int32(0)


@dataclass(frozen=True)
class Tile:
    """`count` cached tokens of one request and one head, the first at position `start`.

    Word d of token s's K is `k[k_base + s * k_stride + d]`; word d of V, of token s or of tokens 2s and
    2s + 1 where words are pairs, is `v[v_base + s * v_stride + d]`.  The tile that follows starts at
    `cache[following]`, its tokens `token_stride` apart.
    """

    start: tirx.Expr
    count: tirx.Expr
    k: tirx.Buffer
    k_base: tirx.Expr
    k_stride: tirx.Expr
    v: tirx.Buffer
    v_base: tirx.Expr
    v_stride: tirx.Expr
    cache: tirx.Buffer
    following: tirx.Expr
    token_stride: tirx.Expr

    def k_row(self, token: tirx.Expr) -> tirx.Expr:
        """Index of the first word of a token's K; past the end that of the last one, never foreign memory."""
        last = T.Cast("int64", self.count - 1)
        return self.k_base + T.min(T.Cast("int64", token), last) * self.k_stride

    def prefetch_following(self, columns: range, start: tirx.Expr, count: int) -> None:
        """Prefetch `count` values of the next tile, numbered token by token in these columns.

        Asked for evenly over the arithmetic of this tile: a core tracks only some 24 misses at a time, and a
        burst of them would stall it.
        """
        for value in range(0, count, CACHE_LINE * 8 // self.cache.dtype.bits):
            token, within = (start + value) // len(columns), (start + value) % len(columns)
            prefetch(self.cache, self.following + T.Cast("int64", token) * self.token_stride + columns.start + within)


@dataclass(frozen=True)
class PagedCache:
    """kv [B, KH, N, C] with strides, block_table [R, W], and the scratch in which tiles become words.

    K and V are the columns `keys` and `values` of C; V may be a part of K.
    """

    vectors: Vectors
    keys: range
    values: range
    tile: int
    kv: tirx.Buffer
    block_table: tirx.Buffer

    def scratch(self) -> tirx.Buffer | None:
        """Per thread: pairs of V, or a tile widened to float32; a float32 cache is read where it lies."""
        if self.vectors.pairs:
            return scratch(self.tile // 2 * len(self.values), "int32")
        return scratch(self.tile * self.width, "float32") if self.kv.dtype == "bfloat16" else None

    @property
    def width(self) -> int:
        """Columns C."""
        return max(self.keys.stop, self.values.stop)

    def for_each_tile(
        self, request, head, first, limit, spare: tirx.Buffer | None, body: Callable[[Tile], None]
    ) -> None:
        """Emit `body(tile)` over the cached tokens of `request` below `limit`, from the block of token `first` on."""
        block_size = T.Cast("int32", self.kv.shape[2])
        block_stride, head_stride, token_stride = self.kv.strides[:3]
        blocks = settled(T.ceildiv(limit, block_size))
        skipped = settled(T.truncdiv(first, block_size))

        def start_of(b):
            return T.Cast("int64", self.block_table[request, b]) * block_stride + T.Cast("int64", head) * head_stride

        with T.serial(0, blocks - skipped) as following_block:
            b = T.Bind(skipped + following_block)
            block = T.Bind(start_of(b))
            next_block = T.Bind(start_of(T.min(b + 1, blocks - 1)))
            used = settled(T.min(block_size, limit - b * block_size))
            with T.serial(0, T.ceildiv(used, self.tile)) as t:
                count = settled(T.min(used - t * self.tile, self.tile))
                base = settled(block + T.Cast("int64", t * self.tile) * token_stride)
                following = T.Select((t + 1) * self.tile < used, base + self.tile * token_stride, next_block)
                body(self._words(b * block_size + t * self.tile, count, base, T.Bind(following), spare))

    def _words(self, start, count, base, following, spare: tirx.Buffer | None) -> Tile:
        C, first_value, token_stride = self.width, self.values.start, self.kv.strides[2]
        size = self.kv.shape[0] * self.kv.strides[0]
        if spare is None:
            flat = T.decl_buffer((size,), "float32", data=self.kv.data, align=4)
            ahead = (flat, following, token_stride)
            return Tile(start, count, flat, base, token_stride, flat, base + first_value, token_stride, *ahead)
        bits = T.decl_buffer((size,), "uint16", data=self.kv.data, align=2)
        ahead = (bits, following, token_stride)

        def values(token, column):
            return T.Cast("uint32", bits[base + T.Cast("int64", token) * token_stride + column])

        if not self.vectors.pairs:

            def widen(s, d):
                bits32 = T.shift_left(values(s, d), T.uint32(16))
                T.buffer_store(spare, T.reinterpret("float32", bits32), [s * C + d])

            with T.serial(0, count) as s:
                self.vectors.for_each(C, lambda d: widen(s, d))
            zero = T.int64(0)
            return Tile(start, count, spare, zero, T.int64(C), spare, T.int64(first_value), T.int64(C), *ahead)

        D = len(self.values)

        def pair(p, d):
            # A last odd token is paired with itself; the weight of the second of them is zero.
            second = T.shift_left(values(T.min(2 * p + 1, count - 1), first_value + d), T.uint32(16))
            first = values(2 * p, first_value + d)
            T.buffer_store(spare, T.reinterpret("int32", T.bitwise_or(first, second)), [p * D + d])

        with T.serial(0, T.ceildiv(count, 2)) as p:
            self.vectors.for_each(D, lambda d: pair(p, d))
        words = T.decl_buffer((T.shift_right(size, T.int64(1)),), "int32", data=self.kv.data, align=2)
        half_base, half_stride = T.shift_right(base, T.int64(1)), T.shift_right(token_stride, T.int64(1))
        return Tile(start, count, words, half_base, half_stride, spare, T.int64(0), T.int64(D), *ahead)
