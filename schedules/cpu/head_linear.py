"""Linear layers of heads: rows of one head are multiplied by that head's weight.

A work item is a chunk of tokens, a head and a block of its panels (matmul.py).  Bytes: H * N * K * size of weights,
T * H * (K + N) * size of activations; 2 * T * H * N * K operations.  DeepSeek-V2-Lite (H = 16, N = 512, K = 128, bf16):
2 MiB of weights, 0.05 ms at 40 GB/s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from ..arguments import bind_arguments
from ..family import Config, KernelFamily, Variant
from ..layouts import Layout
from . import linear
from .matmul import CHUNK, Product, Rows, part
from .matmul_tiles import default_variants, serves
from .matmul_weights import weight_layout


def head_matmul(spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
    """x [T, H, K], w [H, N, K] -> [T, H, N] with the tile of `config` (matmul_tiles.py); it needs T >= rows."""
    product = Product(spec, config, target, False, linear.finish)
    words, size, heads, blocks = product.tile.words, product.tile.rows, spec.input("x").size(1), product.blocks
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        tokens, tensors = bind_arguments(spec, {"weight": product.stored})
        rows = T.Bind(tokens * heads)
        out = T.decl_buffer((rows, product.N), spec.outputs[0].dtype, data=tensors["out"].data, align=2)
        with T.attr(0, "pragma_import_llvm", words.vectors.ir):
            x = words.view(tensors["x"], rows * product.K)
            weights = product.weights(tensors["weight"])
            tiles = T.Bind(T.ceildiv(tokens, size))
            chunks = T.Bind(T.ceildiv(tiles, CHUNK))
            with T.parallel(0, chunks * (heads * blocks)) as item:
                panel = T.Bind(product.first_panel(T.truncmod(item, blocks)))
                head = T.Bind(T.truncmod(T.truncdiv(item, T.int64(blocks)), heads))
                first, count = part(T.truncdiv(item, T.int64(heads * blocks)), chunks, tiles)

                def rows_of(i: tirx.Expr) -> Rows:
                    token = T.Bind(T.min((first + i) * size, tokens - size))

                    def at(r):
                        row = (token + r) * heads + head
                        return row, row

                    return at

                w_panel = T.Bind(head * product.panels + panel)
                product.chunk(tensors, out, x, weights, panel, w_panel, count, rows_of)
    return builder.get()


@dataclass(frozen=True)
class HeadLinear(KernelFamily):
    """`head_linear` with float32 or bfloat16 weights of every shape."""

    name: str = "cpu.head_linear"
    op: str = "head_linear"

    def serves(self, spec: OpSpec, target: Target) -> bool:
        return spec.op == self.op and serves(spec, target, False, lossless=False)

    def layouts(self, spec: OpSpec, target: Target) -> Mapping[str, Layout]:
        return {"weight": weight_layout(spec, target, False, lossless=False)}

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        return default_variants(spec, target, False, lossless=False)

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        return head_matmul(spec, config, target)
