"""The tensor intrinsic of matrix products over panels: a word of x for each row, times one vector of weight words.

What it computes is said in plain TIR (the description, which schedules are matched against); what runs is vdpbf16ps, or
multiply-adds (`Words.multiply_add`), and a prefetch of the panel's words some way ahead.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import DTYPE_BYTES

from .matmul_words import Words
from .vectors import prefetch


def dot_intrinsic(words: Words, rows: int, ahead: int) -> str:
    """Register sums[rows, lanes] += x[rows, size] * w[lanes, size], and give its name.

    Args:
        ahead: words of the panel between what is multiplied and what is prefetched, 0 for no prefetch.
    """
    name = f"vllm_compile.dot_{words.dtype}{'_pairs' if words.vectors.pairs else ''}"
    name += f"_{rows}x{words.vectors.lanes}_ahead{ahead}"
    if TensorIntrin.get(name, allow_missing=True) is None:
        TensorIntrin.register(name, _description(words, rows), _implementation(words, rows, ahead))
    return name


def _description(words: Words, rows: int) -> tirx.PrimFunc:
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        x, w, sums = _operands(words, rows)
        with build.sblock("root"):
            _touched(words, rows, x, w, sums)
            shape = (rows, words.vectors.lanes, words.size)
            with T.grid(*shape) as loops, build.sblock("update"):
                # What is matched has loops of extent 1, but no axes.
                kept = [i for i, extent in enumerate(shape) if extent > 1]
                axes = T.axis.remap("".join("SSR"[i] for i in kept), [loops[i] for i in kept])
                at = dict(zip(kept, [axes] if len(kept) == 1 else axes, strict=True))
                vr, vl, vh = (at.get(i, 0) for i in range(len(shape)))
                product = T.Cast("float32", x[vr, vh]) * T.Cast("float32", w[vl, vh])
                T.buffer_store(sums, sums[vr, vl] + product, [vr, vl])
    return builder.get()


def _implementation(words: Words, rows: int, ahead: int) -> tirx.PrimFunc:
    v = words.vectors
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        x, w, sums = _operands(words, rows)
        with build.sblock("root"):
            _touched(words, rows, x, w, sums)
            if ahead:
                prefetch(w, (ahead * v.lanes, 0))
            weight = _words(words, w.vload([0, 0], f"{words.dtype}x{v.lanes * words.size}"), v.lanes)
            for r in range(rows):
                splat = v.splat(_words(words, x.vload([r, 0], f"{words.dtype}x{words.size}"), 1))
                total = words.multiply_add(weight, splat, sums.vload([r, 0], f"float32x{v.lanes}"))
                T.buffer_store(sums, total, [r, T.ramp(0, 1, v.lanes)])
    return builder.get()


def _operands(words: Words, rows: int) -> tuple[tirx.Buffer, tirx.Buffer, tirx.Buffer]:
    """Tiles of x (rows of any stride), of a panel, and of the sums of a panel."""
    lanes = words.vectors.lanes

    def tile(name: str, shape: tuple[int, int], dtype: str, strides: list | None = None) -> tirx.Buffer:
        handle = T.arg(name, T.handle())
        return T.match_buffer(handle, shape, dtype, strides=strides, align=DTYPE_BYTES[dtype], offset_factor=1)

    x = tile("x", (rows, words.size), words.dtype, [T.int32(), 1])
    return x, tile("w", (lanes, words.size), words.dtype), tile("sums", (rows, lanes), "float32")


def _touched(words: Words, rows: int, x: tirx.Buffer, w: tirx.Buffer, sums: tirx.Buffer) -> None:
    lanes = words.vectors.lanes
    T.reads(sums[0:rows, 0:lanes], x[0:rows, 0 : words.size], w[0:lanes, 0 : words.size])
    T.writes(sums[0:rows, 0:lanes])


def _words(words: Words, values: tirx.Expr, lanes: int) -> tirx.Expr:
    """Values of the operands' dtype as so many words."""
    return values if words.size == 1 else T.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", values)
