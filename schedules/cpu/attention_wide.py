"""Attention with queries in the lanes of a vector: for prefill, where many rows share each cached token.

A row is one query of one head; the G heads of a group and up to `rows / G` neighbouring queries share K
and V.  With rows in the lanes, a cached value is broadcast and multiplies `lanes` rows at once: neither K
nor V is transposed, and maximum, sum and rescaling of the online softmax are lane by lane.
Per cached token and vector of rows: 2 * D / values_per_word multiply-adds and one exp; bound by arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from .attention_tile import NEVER, PagedCache, Scores, Tile, row_index
from .vectors import Vectors, scratch

ROW_VECTORS = 2  # vectors of rows that one block of registers holds


@dataclass(frozen=True)
class Wide:
    """One tile of queries; `rows` is its capacity, padded to whole register blocks."""

    vectors: Vectors
    cache: PagedCache
    rows: int
    heads: int
    group: int
    scores: Scores

    @property
    def step(self) -> int:
        return ROW_VECTORS * self.vectors.lanes

    @property
    def unroll(self) -> int:
        """Cached tokens (or values of V) per register block: with two vectors of rows half the registers."""
        return self.vectors.lanes // 2

    def scratch(self) -> dict[str, tirx.Buffer]:
        rows, tile = self.rows, self.cache.tile
        scores = scratch(tile * rows, "float32")
        return {
            "q": scratch(len(self.cache.keys) // self.vectors.values_per_word * rows, self.vectors.word),
            "scores": scores,
            "weights": T.decl_buffer((tile * rows,), self.vectors.word, data=scores.data),
            "out": scratch(len(self.cache.values) * rows, "float32"),
            "top": scratch(rows, "float32"),
            "scale": scratch(rows, "float32"),
            "sum": scratch(rows, "float32"),
            "position": scratch(rows, "int32"),
        }

    def run(self, b: dict, q_words, out, spare, request, head, first_row, count, position) -> None:
        """Attention of `count` queries from `position` on; the first one's is row `first_row` of [T*H, D]."""
        v, D = self.vectors, len(self.cache.values)
        words = len(self.cache.keys) // v.values_per_word
        rows = T.Bind(count * self.group)
        blocks = T.Bind(T.ceildiv(rows, self.step))

        def row_of(m):
            return row_index(m, rows, first_row, self.heads, self.group)

        with T.serial(0, blocks * self.step) as m:
            source = T.Bind(row_of(m) * words)
            T.buffer_store(b["position"], position + T.min(m, rows - 1) // self.group, [m])
            T.buffer_store(b["top"], T.float32(NEVER), [m])
            T.buffer_store(b["sum"], T.float32(0), [m])
            with T.serial(0, words) as d:
                T.buffer_store(b["q"], T.Cast(v.word, q_words[source + T.Cast("int64", d)]), [d * self.rows + m])
        with T.serial(0, D) as d, T.serial(0, blocks) as g, T.vectorized(0, self.step) as j:
            T.buffer_store(b["out"], T.float32(0), [d * self.rows + g * self.step + j])

        def one_tile(tile: Tile) -> None:
            with T.serial(0, blocks) as g:
                first = T.Bind(g * self.step)
                before = [v.register(v.load(b["top"], first + i * v.lanes)) for i in range(ROW_VECTORS)]
                with T.serial(0, T.ceildiv(tile.count, self.unroll)) as s:
                    self._scores(b, tile, first, s * self.unroll)
                self._softmax(b, tile, first, before)
                with T.serial(0, D // self.unroll) as d:
                    self._values(b, tile, first, d * self.unroll)

        self.cache.for_each_tile(request, head, self.scores.first(position), position + count, spare, one_tile)
        with T.serial(0, blocks) as g:
            for i in range(ROW_VECTORS):
                at = T.Bind(g * self.step + i * v.lanes)
                v.store(b["sum"], v.splat(1.0) / v.load(b["sum"], at), at)
        with T.serial(0, rows) as m:
            target = T.Bind(row_of(m) * D)

            def write(d):
                value = b["out"][d * self.rows + m] * b["sum"][m]
                T.buffer_store(out, T.Cast(out.dtype, value), [target + T.Cast("int64", d)])

            v.for_each(D, write)

    def _scores(self, b: dict, tile: Tile, first, token) -> None:
        """Scores of `unroll` cached tokens from `token`, and the maximum so far."""
        v = self.vectors
        k_rows = [T.Bind(tile.k_row(token + u)) for u in range(self.unroll)]
        scores = [[v.register() for _ in range(ROW_VECTORS)] for _ in range(self.unroll)]
        with T.serial(0, len(self.cache.keys) // v.values_per_word) as d:
            q = [T.Bind(v.load(b["q"], d * self.rows + first + i * v.lanes)) for i in range(ROW_VECTORS)]
            for u in range(self.unroll):
                k = T.Bind(v.splat(tile.k[k_rows[u] + T.Cast("int64", d)]))
                for i in range(ROW_VECTORS):
                    v.store(scores[u][i], v.dot(k, q[i], v.load(scores[u][i])))
        for i in range(ROW_VECTORS):
            at = T.Bind(first + i * v.lanes)
            position = T.Bind(v.load(b["position"], at))
            top = v.load(b["top"], at)
            for u in range(self.unroll):
                # A token past the end of the tile counts as one of the far future.
                seen_from = T.Select(token + u < tile.count, tile.start + token + u, T.int32(2**31 - 1))
                token_position = T.Bind(v.splat(T.Bind(seen_from)))
                visible = token_position <= position
                if self.scores.window:
                    visible = T.And(visible, token_position > position - v.splat(T.int32(self.scores.window)))
                score = v.load(scores[u][i]) * v.splat(self.scores.scale)
                score = T.Bind(T.Select(visible, score, v.splat(NEVER)))
                v.store(b["scores"], score, (token + u) * self.rows + at)
                top = T.max(top, score)
            v.store(b["top"], top, at)

    def _softmax(self, b: dict, tile: Tile, first, before: list[tirx.Buffer]) -> None:
        """Scores to weights exp(score - maximum), in place; `scale` takes the sums to the new maximum."""
        v = self.vectors
        for i in range(ROW_VECTORS):
            at = T.Bind(first + i * v.lanes)
            top = T.Bind(v.load(b["top"], at))
            scale = T.Bind(self.scores.weight(v, v.load(before[i]), top))
            v.store(b["scale"], scale, at)
            total = v.register()
            with T.serial(0, T.ceildiv(tile.count, v.values_per_word)) as s:
                source = T.Bind(s * (v.values_per_word * self.rows) + at)
                weights = [
                    T.Bind(self.scores.weight(v, v.load(b["scores"], source + n * self.rows), top))
                    for n in range(v.values_per_word)
                ]
                word = T.Bind(v.pair(*map(v.to_bf16, weights)) if v.pairs else weights[0])
                v.store(b["weights"], word, s * self.rows + at)
                v.store(total, v.dot(word, v.one, v.load(total)))
            v.store(b["sum"], v.fma(v.load(b["sum"], at), scale, v.load(total)), at)

    def _values(self, b: dict, tile: Tile, first, d) -> None:
        """Rescale `unroll` values of the output and add the tile's."""
        v = self.vectors
        scale = [T.Bind(v.load(b["scale"], first + i * v.lanes)) for i in range(ROW_VECTORS)]
        place = [[(d + u) * self.rows + first + i * v.lanes for i in range(ROW_VECTORS)] for u in range(self.unroll)]
        out = [
            [v.register(v.load(b["out"], place[u][i]) * scale[i]) for i in range(ROW_VECTORS)]
            for u in range(self.unroll)
        ]
        with T.serial(0, T.ceildiv(tile.count, v.values_per_word)) as s:
            weights = [T.Bind(v.load(b["weights"], s * self.rows + first + i * v.lanes)) for i in range(ROW_VECTORS)]
            row = T.Bind(tile.v_base + T.Cast("int64", s) * tile.v_stride + T.Cast("int64", d))
            for u in range(self.unroll):
                value = T.Bind(v.splat(tile.v[row + u]))
                for i in range(ROW_VECTORS):
                    v.store(out[u][i], v.dot(value, weights[i], v.load(out[u][i])))
        for u in range(self.unroll):
            for i in range(ROW_VECTORS):
                v.store(b["out"], v.load(out[u][i]), place[u][i])
