"""The matrix product of `linear`, `gate_up_silu` and the experts' layers: y[T, N] = x[T, K] @ w[N, K].T, w in panels.

A register tile is the sums of `rows` tokens and `panels` panels (panels * lanes outputs); along K it takes a
word of x and a vector of weight words at a time.  A work item is a chunk of CHUNK tiles of rows, one after the
other over the same block of `panels` panels; the items of a chunk come one after the other, so that its part
of x stays in the cache.  Each sum is one chain of multiply-adds in the order of K, whatever the tile: a row's
result has the same bits in every batch.

Roofline.  N * K * size bytes of weights, read from memory once per chunk; 2 * T * N * K operations.  Up to
some 8 tokens (2 * T / size operations per byte) memory is the bound, and what counts is many reads in flight:
8 KiB of prefetches.  From there on it is arithmetic: a word of K costs rows + panels loads and rows * panels
multiply-adds, each in a chain of its own; a dozen of them keep two multiply-add units busy.
A block is read again for every tile of rows, so that it has to fit the L2 cache, with the next block beside it, which
is asked for meanwhile: memory is read while tiles multiply.  Where K is too long for that, a chunk goes through K in
passes, its sums waiting in memory: as float32, so that the chains stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from ..arguments import bind_arguments
from ..family import Config
from .matmul_block import Weights
from .matmul_weights import panel_count, stored_weight, weights_of
from .matmul_words import Words
from .register_tile import Prefetch, Tile
from .vectors import scratch

# Tiles of rows: a block of weights is read from beyond the L2 cache once for so many.
CHUNK = 32

# The value of column j of a panel, in float32.
Value = Callable[[tirx.Expr], tirx.Expr]
# (tensors by name, sums of a row's panels, row, first column) -> Value; may compute on whole vectors.
Finish = Callable[[dict[str, tirx.Buffer], list[tirx.Buffer], tirx.Expr, tirx.Expr], Value]
# Row r of a tile -> (row of x, row of the result).
Rows = Callable[[Any], tuple[tirx.Expr, tirx.Expr]]


class Product:
    """A kernel's matrix product with the tile of `config` (matmul_tiles.py): what it does for one block.

    Args:
        spec: the call; its `x` is [..., K], its `weight` [..., N, K].
        finish: see `Finish`.
        gated: the panels of two halves of N alternate.

    Attributes:
        tile: the register tile.
        stored: the weight as it is stored.
        panels: how many of them a matrix has.
    """

    def __init__(self, spec: OpSpec, config: Config, target: Target, gated: bool, finish: Finish) -> None:
        self.group, self._finish = 2 if gated else 1, finish
        self._spec, self._config, self._target, self._gated = spec, config, target, gated
        x, out = spec.input("x"), spec.outputs[0]
        self.K, self.N, self._dtype = x.size(-1), out.size(-1), x.dtype
        words = Words.of(target, x.dtype)
        self.stored = stored_weight(spec, target, gated, config["lossless"])
        self.tile = Tile(words, self.K, config["rows"], config["panels"])
        self.panels, self._whole = panel_count(spec, target, gated), self.K // words.size
        self._per_pass = max(1, min(config["words"], self._whole))
        assert self.tile.panels % self.group == 0, config
        assert self.tile.panels <= self.panels, (config, self.panels)

    @property
    def blocks(self) -> int:
        """Work items that the panels of a matrix make."""
        return -(-self.panels // self.tile.panels)

    def first_panel(self, block: tirx.Expr) -> tirx.Expr:
        """Where a block starts; the last one overlaps the one before it."""
        return T.min(block * self.tile.panels, T.int64(self.panels - self.tile.panels))

    def weights(self, tensor: tirx.Buffer) -> Weights:
        """The weights in `tensor`."""
        return weights_of(tensor, self._spec, self._config, self._target, self._gated)

    def chunk(
        self,
        tensors: dict[str, tirx.Buffer],
        out: tirx.Buffer,
        x: tirx.Buffer,
        weights: Weights,
        panel: tirx.Expr,
        w_panel: tirx.Expr,
        tiles: tirx.Expr,
        rows_of: Callable[[tirx.Expr], Rows],
    ) -> None:
        """Up to CHUNK tiles of rows, one after the other, over one block.

        Args:
            tensors: of the call, by name.
            out: where results go, [rows, N].
            x: as words.
            weights: see `weights`.
            panel, w_panel: the block's first panel in its matrix, and among those of all matrices.
            tiles: how many.
            rows_of: the rows of tile i; called where tile i is computed.
        """
        tile, group, v = self.tile, self.group, self.tile.words.vectors
        rows, panels, many = tile.rows, tile.panels, self._config["many"]
        per_pass = self._per_pass
        passes = max(1, -(-self._whole // per_pass))
        waiting = scratch((CHUNK if passes > 1 else 1) * rows * panels * v.lanes, "float32")
        with T.serial(0, T.int64(passes)) as n:
            begin, end = T.Bind(n * per_pass), T.Bind(T.min((n + 1) * per_pass, T.int64(self._whole)))
            first, others = weights.block(w_panel, begin)
            ask = self._next_block(weights, w_panel, begin, end, tiles) if many else None
            with T.serial(0, tiles) as i:
                at = rows_of(i)
                place = T.Bind((i if passes > 1 else T.int64(0)) * (rows * panels * v.lanes))

                def sums_at(r, p):
                    return place + (r * panels + p) * v.lanes

                sums = [[v.register() for _ in range(panels)] for _ in range(rows)]
                each = [(sums[r][p], sums_at(r, p)) for r in range(rows) for p in range(panels)]
                if passes > 1:
                    with build.If(n > 0), build.Then():
                        for register, where in each:
                            v.store(register, v.load(waiting, where))
                x_rows = [T.Bind(at(r)[0] * self.K) for r in range(rows)]
                if ask is None:
                    tile.add(sums, x, first, x_rows, begin, end, first.prefetch)
                else:
                    with build.If(i == 0):
                        with build.Then():
                            tile.add(sums, x, first, x_rows, begin, end, first.prefetch)
                        with build.Else():
                            tile.add(sums, x, others, x_rows, begin, end, ask(i))
                with build.If(n == passes - 1), build.Then():
                    tile.add_last(sums, x, others, x_rows)
                for register, where in each:
                    v.store(waiting, v.load(register), where)
                with build.If(n == passes - 1), build.Then():
                    tile.add_listed(waiting, sums_at, x, weights, x_rows, w_panel)
                    with T.serial(0, T.int64(rows)) as r, T.serial(0, T.int64(panels // group)) as p:
                        totals = [v.register(v.load(waiting, sums_at(r, p * group + g))) for g in range(group)]
                        to_panel = T.Bind(T.truncdiv(panel, group) + p)
                        to_row = T.Bind(at(r)[1])
                        self._store(out, self._finish(tensors, totals, to_row, to_panel * v.lanes), to_row, to_panel)

    def _next_block(
        self, weights: Weights, w_panel: tirx.Expr, begin: tirx.Expr, end: tirx.Expr, tiles: tirx.Expr
    ) -> Callable[[tirx.Expr], Prefetch]:
        """How tile i of rows asks for what follows these words of K: all tiles but the first do, for the same share."""
        last = T.Bind(end == self._whole)
        panel = T.Bind(w_panel + T.Select(last, T.int64(self.tile.panels), T.int64(0)))
        lines = weights.lines(panel, T.Bind(T.Select(last, T.int64(0), end)), self._per_pass)
        share = T.Bind(T.ceildiv(T.int64(lines.count), T.max(tiles - 1, T.int64(1))))

        def of_tile(i: tirx.Expr) -> Prefetch:
            def ask(word: tirx.Expr) -> None:
                lines.prefetch((i - 1) * share + T.truncdiv((word - begin) * share, T.int64(self._per_pass)))

            return ask

        return of_tile

    def _store(self, out: tirx.Buffer, value: Value, row: tirx.Expr, panel: tirx.Expr) -> None:
        """A whole panel as a vector; the last one, where N is not a multiple of the lanes, value by value."""
        lanes = self.tile.words.vectors.lanes

        def columns(loop, end: int) -> None:
            with loop(0, end) as j:
                T.buffer_store(out, T.Cast(self._dtype, value(j)), [row, panel * lanes + j])

        if self.N % lanes == 0:
            return columns(T.vectorized, lanes)
        with build.If(panel < self.N // lanes):
            with build.Then():
                columns(T.vectorized, lanes)
            with build.Else():
                columns(T.serial, self.N % lanes)


def part(index: tirx.Expr, parts: tirx.Expr, whole: tirx.Expr) -> tuple[tirx.Expr, tirx.Expr]:
    """Where one of `parts` even parts of `whole` begins, and its size: threads that take whole parts end together."""
    first = T.Bind(T.truncdiv(index * whole, parts))
    return first, T.Bind(T.truncdiv((index + 1) * whole, parts) - first)


def matmul(spec: OpSpec, config: Config, target: Target, gated: bool, finish: Finish) -> tirx.PrimFunc:
    """The kernel of `spec` with the tile of `config` (matmul_tiles.py); it needs T >= rows.

    Where `rows` does not divide T, the last tile overlaps the one before it; so does the last block.
    """
    product = Product(spec, config, target, gated, finish)
    words, rows = product.tile.words, product.tile.rows
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        tokens, tensors = bind_arguments(spec, {"weight": product.stored})
        with T.attr(0, "pragma_import_llvm", words.vectors.ir):
            x = words.view(tensors["x"], tokens * product.K)
            weights = product.weights(tensors["weight"])
            tiles = T.Bind(T.ceildiv(tokens, rows))
            chunks = T.Bind(T.ceildiv(tiles, CHUNK))
            with T.parallel(0, chunks * product.blocks) as item:
                panel = T.Bind(product.first_panel(T.truncmod(item, product.blocks)))
                first, count = part(T.truncdiv(item, T.int64(product.blocks)), chunks, tiles)

                def rows_of(i: tirx.Expr) -> Rows:
                    row = T.Bind(T.min((first + i) * rows, tokens - rows))
                    return lambda r: (row + r, row + r)

                product.chunk(tensors, tensors["out"], x, weights, panel, panel, count, rows_of)
    return builder.get()
