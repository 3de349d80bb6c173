"""Attention with cached tokens in the lanes of a vector: for decode, where few rows share each cached token.

K is transposed in registers, `lanes` tokens at a time, so that scores, maximum and exp use every lane; V is
weighed row by row with its values in the lanes.  Every sum runs in the same order as in `attention_wide`:
a query's result is the same to the last bit by either way.
Per cached token and KV head: 2 * D values read, 4 * D * G operations; at G = 4 and bf16 that is 4 operations
per byte, which one core does faster than memory delivers.  Where V is a part of K (DeepSeek-V2's latent cache) it is
read once for both.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from .attention_tile import NEVER, PagedCache, Scores, Tile, row_index
from .vectors import Vectors, scratch


@dataclass(frozen=True)
class Narrow:
    """At most `capacity` rows: the queries of one item times the `group` heads that share a KV head."""

    vectors: Vectors
    cache: PagedCache
    capacity: int
    heads: int
    group: int
    scores: Scores

    @property
    def block(self) -> int:
        """Rows per register block."""
        return min(4, self.group)

    @property
    def token_vectors(self) -> int:
        """Vectors of tokens per register block of scores; with the rows, half of the registers."""
        return max(1, min(self.cache.tile, self.vectors.lanes**2 // self.block) // self.vectors.lanes)

    def scratch(self) -> dict[str, tirx.Buffer]:
        tile, v = self.cache.tile, self.vectors
        words, D = len(self.cache.keys) // v.values_per_word, len(self.cache.values)
        rows = -(-self.capacity // self.block) * self.block
        scores = scratch(rows * tile, "float32")
        return {
            "q": scratch(rows * words, v.word),
            "k": scratch(words * tile, v.word),
            "scores": scores,
            "weights": T.decl_buffer((rows * tile,), v.word, data=scores.data),
            "weights_bf16": T.decl_buffer((rows * tile * 2,), "uint16", data=scores.data),
            "out": scratch(rows * D, "float32"),
            "top": scratch(rows, "float32"),
            "scale": scratch(rows, "float32"),
            "sum": scratch(rows, "float32"),
        }

    def run(self, b: dict, q_words, out, spare, request, head, first_row, count, position) -> None:
        """Attention of `count` queries from `position` on; the first one's is row `first_row` of [T*H, D]."""
        D = len(self.cache.values)
        words = len(self.cache.keys) // self.vectors.values_per_word
        rows = T.Bind(count * self.group)
        blocks = T.Bind(T.ceildiv(rows, self.block))

        def row_of(m):
            return row_index(m, rows, first_row, self.heads, self.group)

        with T.serial(0, blocks * self.block) as m:
            source = T.Bind(row_of(m) * words)
            T.buffer_store(b["top"], T.float32(NEVER), [m])
            T.buffer_store(b["sum"], T.float32(0), [m])
            with T.serial(0, words) as d:
                value = T.Cast(self.vectors.word, q_words[source + T.Cast("int64", d)])
                T.buffer_store(b["q"], value, [m * words + d])
            self.vectors.for_each(D, lambda d: T.buffer_store(b["out"], T.float32(0), [m * D + d]))

        def one_tile(tile: Tile) -> None:
            with T.serial(0, T.ceildiv(tile.count, self.vectors.lanes)) as s:
                self._transpose(b, tile, s * self.vectors.lanes)
            with T.serial(0, blocks) as r:
                first = T.Bind(r * self.block)
                before = [T.Bind(b["top"][first + i]) for i in range(self.block)]
                # Whole register blocks, then vector by vector: a tile may be as short as one block.
                width, lanes = self.token_vectors * self.vectors.lanes, self.vectors.lanes
                whole = T.Bind(tile.count // width)
                with T.serial(0, whole) as s:
                    self._scores(b, tile, first, s * width, self.token_vectors, position)
                with T.serial(0, T.ceildiv(tile.count - whole * width, lanes)) as s:
                    self._scores(b, tile, first, whole * width + s * lanes, 1, position)
                for i in range(self.block):
                    self._softmax(b, tile, first + i, before[i])
                self._values(b, tile, first)

        self.cache.for_each_tile(request, head, self.scores.first(position), position + count, spare, one_tile)
        with T.serial(0, rows) as m:
            target = T.Bind(row_of(m) * D)
            inverse = T.Bind(T.float32(1) / b["sum"][m])

            def write(d):
                value = T.Cast(out.dtype, b["out"][m * D + d] * inverse)
                T.buffer_store(out, value, [target + T.Cast("int64", d)])

            self.vectors.for_each(D, write)

    def _transpose(self, b: dict, tile: Tile, token) -> None:
        """K of `lanes` tokens from `token`, words by tokens."""
        v = self.vectors
        words = len(self.cache.keys) // v.values_per_word
        rows = [T.Bind(tile.k_row(token + i)) for i in range(v.lanes)]
        with T.serial(0, -(-words // v.lanes)) as i:
            # The last block of words overlaps the one before where D is no multiple of a block.
            d = T.Bind(T.min(i * v.lanes, words - v.lanes))
            block = [T.Bind(v.load(tile.k, row + T.Cast("int64", d))) for row in rows]
            for j, column in enumerate(v.transpose(block)):
                v.store(b["k"], column, (d + j) * self.cache.tile + token)

    def _scores(self, b: dict, tile: Tile, first, token, vectors: int, position) -> None:
        """Scores of `vectors` vectors of tokens from `token` for a block of rows, and the maximum so far."""
        v = self.vectors
        words = len(self.cache.keys) // v.values_per_word
        scores = [[v.register() for _ in range(vectors)] for _ in range(self.block)]
        per_word = vectors * v.lanes * v.values_per_word
        with T.serial(0, words) as d:
            tile.prefetch_following(self.cache.keys, token * len(self.cache.keys) + d * per_word, per_word)
            k = [T.Bind(v.load(b["k"], d * self.cache.tile + token + j * v.lanes)) for j in range(vectors)]
            for i in range(self.block):
                q = T.Bind(v.splat(b["q"][(first + i) * words + d]))
                for j in range(vectors):
                    v.store(scores[i][j], v.dot(k[j], q, v.load(scores[i][j])))
        for i in range(self.block):
            # The first token of the tile that this row does not see.
            place = T.Bind(position + (first + i) // self.group - tile.start)
            end = T.Bind(T.min(tile.count, place + 1))
            begin = T.Bind(place - (self.scores.window - 1))
            top = v.splat(NEVER)
            for j in range(vectors):
                index = T.ramp(token + j * v.lanes, 1, v.lanes)
                score = v.load(scores[i][j]) * v.splat(self.scores.scale)
                seen = index < v.splat(end)
                if self.scores.window:
                    seen = T.And(seen, index >= v.splat(begin))
                score = T.Bind(T.Select(seen, score, v.splat(NEVER)))
                v.store(b["scores"], score, (first + i) * self.cache.tile + token + j * v.lanes)
                top = T.max(top, score)
            T.buffer_store(b["top"], T.max(b["top"][first + i], v.maximum(top)), [first + i])

    def _softmax(self, b: dict, tile: Tile, row, before) -> None:
        """Scores of one row to weights exp(score - maximum), in place."""
        v = self.vectors
        top = T.Bind(v.splat(b["top"][row]))
        scale = v.register(self.scores.weight(v, v.splat(before), top))
        T.buffer_store(b["scale"], scale[0], [row])
        with T.serial(0, T.ceildiv(tile.count, v.lanes)) as s:
            at = T.Bind(row * self.cache.tile + s * v.lanes)
            weight = T.Bind(self.scores.weight(v, v.load(b["scores"], at), top))
            if v.pairs:
                v.store(b["weights_bf16"], v.to_bf16(weight), row * self.cache.tile + at)
            else:
                v.store(b["weights"], weight, at)

    def _values(self, b: dict, tile: Tile, first) -> None:
        """Rescale the output of a block of rows and add the tile's values and weights."""
        v, values = self.vectors, self.cache.values
        D, within_keys = len(values), values.start in self.cache.keys
        at_once = 4 if v.lanes == 16 else 2  # vectors of values: with `block` rows they fill the registers
        scale = [T.Bind(b["scale"][first + i]) for i in range(self.block)]
        for start in range(0, D // v.lanes, at_once):
            columns = [c * v.lanes for c in range(start, min(start + at_once, D // v.lanes))]
            out = [
                [v.register(v.load(b["out"], (first + i) * D + c) * v.splat(scale[i])) for c in columns]
                for i in range(self.block)
            ]
            totals = [v.register() for _ in range(self.block)] if start == 0 else []
            with T.serial(0, T.ceildiv(tile.count, v.values_per_word)) as s:
                row = T.Bind(tile.v_base + T.Cast("int64", s) * tile.v_stride)
                for n in range(0 if within_keys else v.values_per_word):
                    ahead = (s * v.values_per_word + n) * D + columns[0]
                    tile.prefetch_following(values, ahead, len(columns) * v.lanes)
                loaded = [T.Bind(v.load(tile.v, row + c)) for c in columns]
                for i in range(self.block):
                    weight = T.Bind(v.splat(b["weights"][(first + i) * self.cache.tile + s]))
                    for j, value in enumerate(loaded):
                        v.store(out[i][j], v.dot(value, weight, v.load(out[i][j])))
                    if totals:
                        v.store(totals[i], v.dot(weight, v.one, v.load(totals[i])))
            for i in range(self.block):
                for j, c in enumerate(columns):
                    v.store(b["out"], v.load(out[i][j]), (first + i) * D + c)
                if totals:
                    row_sum = v.register(v.fma(v.splat(b["sum"][first + i]), v.splat(scale[i]), v.load(totals[i])))
                    T.buffer_store(b["sum"], row_sum[0], [first + i])
