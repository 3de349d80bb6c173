"""The matrix product of `linear` and `gate_up_silu`: y[T, N] = x[T, K] @ w[N, K].T, with w in panels.

A thread takes a block of `panels` panels (panels * lanes outputs) and walks down the tokens, `rows` at a time;
the rows * panels vectors of sums of such a tile stay in registers over the whole of K.  Each sum is one chain of
multiply-adds in the order of K, whatever the tile: a row's result has the same bits in every batch.

Roofline.  Weights are read from memory once, N * K * size bytes; 2 * T * N * K operations.  Up to some 8 tokens
memory is the bound (2 * T / size operations per byte), and many small loads in flight matter, hence the
prefetches.  From there on it is arithmetic: a step over one word of K loads panels + rows words for
rows * panels multiply-adds, 8 and 3 for 24 chains, enough to hide the latency of two units.
A block is read again for every tile of rows: it has to fit the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import DTYPE_BYTES, OpSpec, Sym
from vllm_compile.targets import Target
from vllm_compile.targets.cpu import AVX512_BF16

from ..family import Config, Variant
from ..layouts import Panels
from .attention_vectors import Vectors

# Sums of one or more panels of one row -> the result, for column j of the panel, in float32.
Value = Callable[[tirx.Expr], tirx.Expr]
# (tensors by name, vectors of sums, row, first column) -> value of each column; may emit code on whole vectors.
Finish = Callable[[dict[str, tirx.Buffer], list[tirx.Buffer], tirx.Expr, tirx.Expr], Value]


def weight_layout(spec: OpSpec, target: Target, gated: bool = False) -> Panels:
    """The layout that every variant reads."""
    return Panels(target.vector_lanes, 2 if spec.input("x").dtype == "bfloat16" else 1, gated)


@dataclass(frozen=True)
class Words:
    """How a vector of weight words is multiplied with a word of x: one float32, or two neighbouring bf16 values."""

    vectors: Vectors
    dtype: str

    @staticmethod
    def of(target: Target, dtype: str) -> Words:
        return Words(Vectors(target.vector_lanes, dtype == "bfloat16" and target.has(AVX512_BF16)), dtype)

    @property
    def size(self) -> int:
        """Values of K in a word."""
        return 2 if self.dtype == "bfloat16" else 1

    @property
    def type(self) -> str:
        return "int32" if self.dtype == "bfloat16" else "float32"

    def view(self, x: tirx.Buffer, size: tirx.Expr) -> tirx.Buffer:
        """A tensor of values as one flat axis, to take words from; rows of odd length leave words unaligned."""
        return T.decl_buffer((size,), "uint16" if self.size == 2 else "float32", data=x.data, align=DTYPE_BYTES[x.dtype])

    def load(self, x: tirx.Buffer, offset: tirx.Expr) -> tirx.Expr:
        return T.reinterpret("int32", x.vload([offset], "uint16x2")) if self.size == 2 else x[offset]

    def load_last(self, x: tirx.Buffer, offset: tirx.Expr) -> tirx.Expr:
        """The word of a last value without a neighbour."""
        return T.Cast("int32", x[offset])

    def multiply_add(self, weight: tirx.Expr, x: tirx.Expr, total: tirx.Expr) -> tirx.Expr:
        v = self.vectors
        if v.pairs or self.size == 1:
            return v.dot(weight, x, total)
        for widen in (self._low, self._high):
            total = v.fma(widen(weight), widen(x), total)
        return total

    def _low(self, word: tirx.Expr) -> tirx.Expr:
        """The first bf16 value of each pair: a float32 whose upper half it is."""
        v = self.vectors
        return T.reinterpret(f"float32x{v.lanes}", T.shift_left(word, v.splat(T.int32(16))))

    def _high(self, word: tirx.Expr) -> tirx.Expr:
        v = self.vectors
        return T.reinterpret(f"float32x{v.lanes}", T.bitwise_and(word, v.splat(T.int32(-0x10000))))


@dataclass(frozen=True)
class Tile:
    """rows x panels vectors of sums over all of K; `prefetch` words ahead of the loads, 0 for none."""

    words: Words
    K: int
    rows: int
    panels: int
    prefetch: int

    def run(self, x: tirx.Buffer, w: tirx.Buffer, row: tirx.Expr, panel: tirx.Expr) -> list[list[tirx.Buffer]]:
        """Sums [rows][panels] of the rows from `row` and the panels from `panel`."""
        size, v = self.words.size, self.words.vectors
        length = -(-self.K // size)
        totals = [[v.register() for _ in range(self.panels)] for _ in range(self.rows)]
        x_rows = [T.Bind((row + r) * self.K) for r in range(self.rows)]
        w_panels = [T.Bind((panel + p) * (length * v.lanes)) for p in range(self.panels)]

        def step(k: tirx.Expr, load: Callable) -> None:
            weights = [T.Bind(v.load(w, start + k * v.lanes)) for start in w_panels]
            for r in range(self.rows):
                word = T.Bind(v.splat(load(x, x_rows[r] + k * size)))
                for p in range(self.panels):
                    v.store(totals[r][p], self.words.multiply_add(weights[p], word, v.load(totals[r][p])))

        with T.serial(0, T.int64(self.K // size)) as k:
            self._prefetch(w, w_panels, k, length)
            step(k, self.words.load)
        if self.K % size:
            step(T.int64(length - 1), self.words.load_last)
        return totals

    def _prefetch(self, w: tirx.Buffer, w_panels: list[tirx.Expr], k: tirx.Expr, length: int) -> None:
        if not self.prefetch:
            return
        # Past the end of its panel a stream goes on in the next block.
        skip = (self.panels - 1) * length
        ahead = T.Bind(self.prefetch + k + T.Select(k + self.prefetch < length, T.int64(0), T.int64(skip)))
        for start in w_panels:
            address = T.address_of(w[start + ahead * self.words.vectors.lanes])
            read, keep, data = T.int32(0), T.int32(3), T.int32(1)
            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", address, read, keep, data))


def matmul(spec: OpSpec, config: Config, target: Target, gated: bool, finish: Finish) -> tirx.PrimFunc:
    """The kernel of `spec` with the tile of `config` (rows, panels, prefetch); it needs T >= rows.

    Where `rows` does not divide T, the last tile overlaps the one before it, and so does the last block of panels.
    """
    _, K = spec.input("x").shape
    dtype = spec.input("x").dtype
    words = Words.of(target, dtype)
    lanes = words.vectors.lanes
    count, length, *_ = packed = weight_layout(spec, target, gated).shape(spec.input("weight").shape)
    tile = Tile(words, K, config["rows"], config["panels"], config["prefetch"])
    group = 2 if gated else 1
    N = spec.outputs[0].shape[1]
    assert tile.panels % group == 0 and tile.panels <= count, (config, packed)

    def store(out: tirx.Buffer, value: Value, row: tirx.Expr, panel: tirx.Expr) -> None:
        """A whole panel as a vector; the last, if N is not a multiple of the lanes, value by value."""

        def columns(loop, end: int) -> None:
            with loop(0, end) as j:
                T.buffer_store(out, T.Cast(dtype, value(j)), [row, panel * lanes + j])

        if N % lanes == 0:
            return columns(T.vectorized, lanes)
        with build.If(panel < N // lanes):
            with build.Then():
                columns(T.vectorized, lanes)
            with build.Else():
                columns(T.serial, N % lanes)

    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        handles = [T.arg(name, T.handle()) for name, _ in spec.inputs] + [T.arg("out", T.handle())]
        tokens = T.int64()
        tensors = {}
        for handle, (name, tensor) in zip(handles, (*spec.inputs, ("out", spec.outputs[0])), strict=True):
            shape = packed if name == "weight" else [tokens if dim == Sym.TOKENS else dim for dim in tensor.shape]
            tensors[name] = T.match_buffer(handle, shape, tensor.dtype, align=DTYPE_BYTES[tensor.dtype])
        with T.attr(0, "pragma_import_llvm", words.vectors.ir):
            x = words.view(tensors["x"], tokens * K)
            w = T.decl_buffer((count * length * lanes,), words.type, data=tensors["weight"].data, align=2)
            with T.parallel(0, T.int64(-(-count // tile.panels))) as block:
                panel = T.Bind(T.min(block * tile.panels, T.int64(count - tile.panels)))
                with T.serial(0, T.ceildiv(tokens, tile.rows)) as i:
                    row = T.Bind(T.min(i * tile.rows, tokens - tile.rows))
                    for r, totals in enumerate(tile.run(x, w, row, panel)):
                        for p in range(0, tile.panels, group):
                            target_panel = T.Bind(T.floordiv(panel + p, group))
                            value = finish(tensors, totals[p : p + group], row + r, target_panel * lanes)
                            store(tensors["out"], value, row + r, target_panel)
    return builder.get()


def tilings(spec: OpSpec, target: Target, gated: bool = False) -> Sequence[Config]:
    """The tiles whose sums and operands fit the vector registers, by rows."""
    words = Words.of(target, spec.input("x").dtype)
    registers = 32 if words.vectors.lanes == 16 else 16
    count = weight_layout(spec, target, gated).shape(spec.input("weight").shape)[0]
    # Widened words take a register for each of their values, and one for the mask.
    widened = words.size == 2 and not words.vectors.pairs
    operands = {p: 2 * p + 3 if widened else p + 1 for p in range(1, 9)}
    return [
        {"rows": rows, "panels": panels, "prefetch": prefetch}
        for rows in range(1, 15)
        for panels in range(1, 9)
        if panels <= count and panels % (2 if gated else 1) == 0 and rows * panels + operands[panels] <= registers
        for prefetch in (0, 16, 32, 64)
    ]


def default_variants(spec: OpSpec, target: Target, gated: bool = False) -> Sequence[Variant]:
    variants = []
    space = tilings(spec, target, gated)
    for rows in (1, 2, 4, 6, 8, 12):
        fitting = [c for c in space if c["rows"] == rows]
        if fitting:
            panels = min(2 if rows > 2 or gated else 4, max(c["panels"] for c in fitting))
            variants.append(Variant(rows, {"rows": rows, "panels": panels, "prefetch": 0 if rows == 1 else 64}))
    return variants
