"""Linear layers of experts: each row is multiplied by the weight of the expert that it goes to.

Rows of one expert are a group (`route` has sorted them).  A work item is a block of panels (matmul.py) and a group; an
item reads its block once from memory, whatever the number of rows, so that of all weights only those of chosen experts
are read, and each once.  Items of one block come one after the other: threads share every group evenly.

Roofline.  With G groups (min(E, T * k) at most) G * N * K * size bytes of weights, 2 * T * k * N * K operations.  A
group of a single row, most groups when few tokens are decoded, is bound by memory like a `linear` of one token; so is
any group of up to some 8 rows.  Mixtral-8x7B (N = 28672, K = 4096, k = 2, bf16), one token: 2 * 224 MiB of gate and up,
12 ms at 40 GB/s, of 8 * 224 MiB that are there.
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
from . import gate_up, linear
from .matmul import CHUNK, Finish, Product, Rows
from .matmul_tiles import default_variants
from .matmul_weights import weight_layout


def expert_matmul(spec: OpSpec, config: Config, target: Target, gated: bool, finish: Finish) -> tirx.PrimFunc:
    """x [T, K] (of each token) or [T, k, K] (of each of its experts), w [E, N, K] -> [T, k, N].

    A group has any number of rows: one takes a tile of one row; of several, the last tile repeats its last row.
    """
    top_k = spec.input("experts").size(1)
    single = {**config, "rows": 1}
    products = [Product(spec, c, target, gated, finish) for c in (single, config)]
    words, blocks = products[0].tile.words, products[0].blocks
    shared = len(spec.input("x").shape) == 2
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        tokens, tensors = bind_arguments(spec, {"weight": products[0].stored})
        slots = T.Bind(tokens * top_k)
        experts, order, ends = (
            T.decl_buffer((slots,), "int32", data=tensors[name].data, align=4) for name in ("experts", "order", "ends")
        )
        out = T.decl_buffer((slots, products[0].N), spec.outputs[0].dtype, data=tensors["out"].data, align=2)
        with T.attr(0, "pragma_import_llvm", words.vectors.ir):
            x = words.view(tensors["x"], (tokens if shared else slots) * products[0].K)
            weights = products[0].weights(tensors["weight"])
            with T.parallel(0, slots * blocks) as item:
                block = T.Bind(T.truncdiv(item, slots))
                begin = T.Bind(item - block * slots)
                # Only the first row of a group has work.
                before = T.Cast("int64", ends[T.max(begin - 1, T.int64(0))])
                with build.If(T.Or(begin == 0, before == begin)), build.Then():
                    rows = T.Bind(T.Cast("int64", ends[begin]) - begin)
                    expert = T.Bind(T.Cast("int64", experts[T.Cast("int64", order[begin])]))
                    panel = T.Bind(products[0].first_panel(block))

                    def run(product: Product, begin=begin, rows=rows, expert=expert, panel=panel) -> None:
                        size = product.tile.rows
                        tiles = T.Bind(T.ceildiv(rows, T.int64(size)))
                        with T.serial(0, T.ceildiv(tiles, T.int64(CHUNK))) as chunk:
                            first = T.Bind(chunk * CHUNK)

                            def rows_of(i: tirx.Expr) -> Rows:
                                tile = T.Bind((first + i) * size)

                                def at(r):
                                    slot = T.Cast("int64", order[begin + T.min(tile + r, rows - 1)])
                                    return T.truncdiv(slot, T.int64(top_k)) if shared else slot, slot

                                return at

                            count = T.min(T.int64(CHUNK), tiles - first)
                            w_panel = T.Bind(expert * product.panels + panel)
                            product.chunk(tensors, out, x, weights, panel, w_panel, count, rows_of)

                    if config["rows"] == 1:
                        run(products[0])
                    else:
                        with build.If(rows == 1):
                            with build.Then():
                                run(products[0])
                            with build.Else():
                                run(products[1])
    return builder.get()


class _ExpertFamily(KernelFamily):
    """Experts of every shape, with float32 or bfloat16 weights."""

    gated: bool

    def serves(self, spec: OpSpec, target: Target) -> bool:
        dtypes = {spec.input("x").dtype, spec.input("weight").dtype, spec.outputs[0].dtype}
        return spec.op == self.op and dtypes in ({"float32"}, {"bfloat16"})

    def layouts(self, spec: OpSpec, target: Target) -> Mapping[str, Layout]:
        return {"weight": weight_layout(spec, target, self.gated, lossless=False)}

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        """One token's groups are single rows; with more tokens, tiles for many rows.

        They do not ask for the next block: the one after it may be another expert's.
        """
        of_linear = [variant.config for variant in default_variants(spec, target, self.gated, lossless=False)]
        few, many = of_linear[0], next(c for c in of_linear if c["rows"] == of_linear[-1]["rows"])
        return (Variant(1, few), Variant(2, many)) if few != many else (Variant(1, few),)


@dataclass(frozen=True)
class ExpertLinear(_ExpertFamily):
    """`expert_linear`."""

    name: str = "cpu.expert_linear"
    op: str = "expert_linear"
    gated: bool = False

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        return expert_matmul(spec, config, target, self.gated, linear.finish)


@dataclass(frozen=True)
class ExpertGateUpSilu(_ExpertFamily):
    """`expert_gate_up_silu`."""

    name: str = "cpu.expert_gate_up_silu"
    op: str = "expert_gate_up_silu"
    gated: bool = True

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        return expert_matmul(spec, config, target, self.gated, gate_up.finish)
