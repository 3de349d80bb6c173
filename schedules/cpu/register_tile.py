"""The register tile of matrix products: the sums of some tokens and some panels, while K goes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from .matmul_block import Block, Weights
from .matmul_words import Words

Sums = list[list[tirx.Buffer]]
# At a word of K: ask for what is read later.
Prefetch = Callable[[tirx.Expr], None]


@dataclass(frozen=True)
class Tile:
    """Sums [rows][panels], a vector each, of x times w."""

    words: Words
    K: int
    rows: int
    panels: int

    def add(self, sums: Sums, x: tirx.Buffer, w: Block, x_rows: list, begin, end, prefetch: Prefetch) -> None:
        """Add the products of the words from `begin` to `end`; `x_rows` are where the rows of x start."""
        step = T.int64(w.step)
        with T.serial(T.truncdiv(begin, step), T.truncdiv(end, step)) as n:
            first = T.Bind(n * step)
            prefetch(first)

            def load(r: int, k) -> tirx.Expr:
                return self.words.load(x, x_rows[r] + k * self.words.size)

            self._step(sums, w, first, load)

    def add_last(self, sums: Sums, x: tirx.Buffer, w: Block, x_rows: list) -> None:
        """Add the product of a last value without a neighbour, if there is one."""
        if self.K % self.words.size:
            last = T.int64(self.K // self.words.size)
            self._step(sums, w, last, lambda r, k: self.words.load_half(x, x_rows[r] + (self.K - 1)))

    def add_listed(
        self, sums: tirx.Buffer, place: Callable[[int, int], tirx.Expr], x: tirx.Buffer, w: Weights, x_rows: list, panel
    ) -> None:
        """Add the products of weights that stand in a list, to sums that are at `place(r, p)`."""

        def add(p: int, k, lane, weight) -> None:
            for r in range(self.rows):
                at = T.Bind(place(r, p) + lane)
                value = self.words.value(x, x_rows[r] + k)
                T.buffer_store(sums, T.call_llvm_pure_intrin("float32", "llvm.fma", weight, value, sums[at]), [at])

        w.add_listed(panel, add)

    def _step(self, sums: Sums, w: Block, first, load: Callable[[int, tirx.Expr], tirx.Expr]) -> None:
        """The products of words from `first` on with those of x, load(r, k).

        Vectors of weights wait in registers, words of x are used up as they come: the largest tiles have more rows than
        panels.
        """
        v = self.words.vectors
        weights = [[T.Bind(weight) for weight in w.read(p, first)] for p in range(self.panels)]
        for i in range(w.step):
            for r in range(self.rows):
                splat = v.splat(T.Bind(load(r, first + i)))
                for p in range(self.panels):
                    v.store(sums[r][p], self.words.multiply_add(weights[p][i], splat, v.load(sums[r][p])))
