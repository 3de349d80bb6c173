"""The matrix product of `linear` and `gate_up_silu`: y[T, N] = x[T, K] @ w[N, K].T, with w in panels.

A register tile is the sums of `rows` tokens and `panels` panels (panels * lanes outputs); along K it takes a
word of x and a vector of weight words at a time.  A work item is a chunk of CHUNK tiles of rows, one after the
other over the same block of `panels` panels; the items of a chunk come one after the other, so that its part
of x stays in the cache.  Each sum is one chain of multiply-adds in the order of K, whatever the tile: a row's
result has the same bits in every batch.

Roofline.  N * K * size bytes of weights, read from memory once per chunk; 2 * T * N * K operations.  Up to
some 8 tokens (2 * T / size operations per byte) memory is the bound, and what counts is many reads in flight:
8 KiB of prefetches.  From there on it is arithmetic: a word of K costs rows + panels loads and rows * panels
multiply-adds, 24 of which, in chains of their own, keep two multiply-add units busy.
A block is read again for every tile of rows, so that it has to fit the L2 cache (L1, if it is unpacked for a single
tile).  Where K is too long for that, a chunk goes through K in passes, its sums waiting in memory: as float32, so
that the chains stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from ..arguments import bind_arguments
from ..family import Config
from .matmul_weights import Block, Weights, panel_count, stored_weight, weights_of
from .matmul_words import Words
from .vectors import scratch

# Tiles of rows: a block of weights is read from beyond the L2 cache once for so many.
CHUNK = 32

# The value of column j of a panel, in float32.
Value = Callable[[tirx.Expr], tirx.Expr]
# (tensors by name, sums of a row's panels, row, first column) -> Value; may compute on whole vectors.
Finish = Callable[[dict[str, tirx.Buffer], list[tirx.Buffer], tirx.Expr, tirx.Expr], Value]
Sums = list[list[tirx.Buffer]]


@dataclass(frozen=True)
class Tile:
    """Sums [rows][panels], a vector each, of x times w."""

    words: Words
    K: int
    rows: int
    panels: int

    def add(self, sums: Sums, x: tirx.Buffer, w: Block, row, begin, end) -> None:
        """Add the products of the words from `begin` to `end`."""
        x_rows = [T.Bind((row + r) * self.K) for r in range(self.rows)]
        step = T.int64(w.step)
        with T.serial(T.truncdiv(begin, step), T.truncdiv(end, step)) as n:
            first = T.Bind(n * step)
            w.prefetch(first)

            def load(r: int, k) -> tirx.Expr:
                return self.words.load(x, x_rows[r] + k * self.words.size)

            self._step(sums, w, first, load)

    def add_last(self, sums: Sums, x: tirx.Buffer, w: Block, row) -> None:
        """Add the product of a last value without a neighbour, if there is one."""
        if self.K % self.words.size:
            last = T.int64(self.K // self.words.size)
            self._step(sums, w, last, lambda r, k: self.words.load_half(x, (row + r) * self.K + (self.K - 1)))

    def add_listed(
        self, sums: tirx.Buffer, place: Callable[[int, int], tirx.Expr], x: tirx.Buffer, w: Weights, row, panel
    ) -> None:
        """Add the products of weights that stand in a list, to sums that are at `place(r, p)`."""

        def add(p: int, k, lane, weight) -> None:
            for r in range(self.rows):
                at = T.Bind(place(r, p) + lane)
                value = self.words.value(x, (row + r) * self.K + k)
                T.buffer_store(sums, T.call_llvm_pure_intrin("float32", "llvm.fma", weight, value, sums[at]), [at])

        w.add_listed(panel, add)

    def _step(self, sums: Sums, w: Block, first, load: Callable[[int, tirx.Expr], tirx.Expr]) -> None:
        """The products of words from `first` on with those of x, load(r, k)."""
        v = self.words.vectors
        splats = [[v.splat(T.Bind(load(r, first + i))) for r in range(self.rows)] for i in range(w.step)]
        for p in range(self.panels):
            for i, weight in enumerate(w.read(p, first)):
                for r in range(self.rows):
                    v.store(sums[r][p], self.words.multiply_add(T.Bind(weight), splats[i][r], v.load(sums[r][p])))


def matmul(spec: OpSpec, config: Config, target: Target, gated: bool, finish: Finish) -> tirx.PrimFunc:
    """The kernel of `spec` with the tile of `config` (matmul_tiles.py); it needs T >= rows.

    Where `rows` does not divide T, the last tile overlaps the one before it; so does the last block.
    """
    dtype, group = spec.input("x").dtype, 2 if gated else 1
    K, N = spec.input("x").sizes()[1], spec.outputs[0].sizes()[1]
    words = Words.of(target, dtype)
    v = words.vectors
    stored = stored_weight(spec, target, gated, config["lossless"])
    tile = Tile(words, K, config["rows"], config["panels"])
    rows, panels, count, whole = tile.rows, tile.panels, panel_count(spec, target, gated), K // words.size
    assert panels % group == 0, config
    assert panels <= count, (config, count)
    per_pass = min(config["words"], whole)
    passes = -(-whole // per_pass)

    def store(out: tirx.Buffer, value: Value, row, panel) -> None:
        """A whole panel as a vector; the last one, where N is not a multiple of the lanes, value by value."""

        def columns(loop, end: int) -> None:
            with loop(0, end) as j:
                T.buffer_store(out, T.Cast(dtype, value(j)), [row, panel * v.lanes + j])

        if N % v.lanes == 0:
            return columns(T.vectorized, v.lanes)
        with build.If(panel < N // v.lanes):
            with build.Then():
                columns(T.vectorized, v.lanes)
            with build.Else():
                columns(T.serial, N % v.lanes)

    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        tokens, tensors = bind_arguments(spec, {"weight": stored})
        with T.attr(0, "pragma_import_llvm", v.ir):
            x = words.view(tensors["x"], tokens * K)
            weights = weights_of(tensors["weight"], spec, config, target, gated)
            tiles = T.Bind(T.ceildiv(tokens, rows))
            chunks = T.Bind(T.ceildiv(tiles, CHUNK))
            blocks = -(-count // panels)
            with T.parallel(0, chunks * blocks) as item:
                panel = T.Bind(T.min(T.truncmod(item, blocks) * panels, T.int64(count - panels)))
                first = T.Bind(T.truncdiv(item, T.int64(blocks)) * CHUNK)
                waiting = scratch((CHUNK if passes > 1 else 1) * rows * panels * v.lanes, "float32")
                with T.serial(0, T.int64(passes)) as n:
                    begin, end = T.Bind(n * per_pass), T.Bind(T.min((n + 1) * per_pass, T.int64(whole)))
                    w = weights.block(panel, begin, end)
                    with T.serial(0, T.min(T.int64(CHUNK), tiles - first)) as i:
                        row = T.Bind(T.min((first + i) * rows, tokens - rows))
                        place = T.Bind((i if passes > 1 else T.int64(0)) * (rows * panels * v.lanes))

                        def sums_at(r, p):
                            return place + (r * panels + p) * v.lanes

                        sums = [[v.register() for _ in range(panels)] for _ in range(rows)]
                        each = [(sums[r][p], sums_at(r, p)) for r in range(rows) for p in range(panels)]
                        if passes > 1:
                            with build.If(n > 0), build.Then():
                                for register, at in each:
                                    v.store(register, v.load(waiting, at))
                        tile.add(sums, x, w, row, begin, end)
                        with build.If(n == passes - 1), build.Then():
                            tile.add_last(sums, x, w, row)
                        for register, at in each:
                            v.store(waiting, v.load(register), at)
                        with build.If(n == passes - 1), build.Then():
                            tile.add_listed(waiting, sums_at, x, weights, row, panel)
                            with T.serial(0, T.int64(rows)) as r, T.serial(0, T.int64(panels // group)) as p:
                                totals = [v.register(v.load(waiting, sums_at(r, p * group + g))) for g in range(group)]
                                to_panel = T.Bind(T.truncdiv(panel, group) + p)
                                value = finish(tensors, totals, row + r, to_panel * v.lanes)
                                store(tensors["out"], value, row + r, to_panel)
    return builder.get()
