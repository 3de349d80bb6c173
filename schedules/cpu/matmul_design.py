"""Matrix products in plain TIR, for MetaSchedule to search: few tokens, of known number, and plain weights in panels.

    sums[panel, t, lane] = sum over words of K: x[t, word] * w[panel, word, lane]
    out[t, column, lane] = finish(sums of the column's panels)

A column is a vector of the result; where products are gated it has two panels, one otherwise.  A work item is some
neighbouring columns, whose sums stay in registers while K goes by; each sum is one chain of multiply-adds in the order
of K, so that a row has the bits that every other kernel of the family gives it.  What is searched: columns of an item,
words of K without a jump, how far ahead weights are asked for.
Bytes as in linear.py and gate_up.py: the bound is memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets import Target

from ..arguments import bind_arguments
from ..design import Design
from .dot_intrinsic import dot_intrinsic
from .matmul import Finish
from .matmul_weights import stored_weight
from .matmul_words import Words
from .vectors import stack

MOST_WORDS = 8  # of K without a jump: more would not fit the cache of decoded instructions
AHEAD = (0, 16, 32, 64, 128, 256)  # words of a panel; 64 bytes each on AVX-512
INDEXED = 2**31  # elements that TIR's 32-bit indices reach


@lru_cache
def matmul_design(
    spec: OpSpec, tokens: int, target: Target, finish: Finish, activation: Finish | None = None
) -> Design | None:
    """What there is to search for `tokens` tokens; None where it is not served.

    That is with ragged panels, and sums that do not fit the registers.

    Args:
        finish: computes on single values.
        activation: of gated products: takes the gate's place, in float32, before `finish`.
    """
    words, (rows, K) = Words.of(target, spec.input("x").dtype), spec.input("weight").sizes()
    N, halves = spec.outputs[0].size(-1), 1 if activation is None else 2
    most = (32 if words.vectors.lanes == 16 else 16) * 3 // 4 // (tokens * halves)
    if N % words.vectors.lanes or K % words.size or most == 0 or rows * K >= INDEXED:
        return None

    def spaces(schedule: Schedule) -> Sequence[Schedule]:
        return [_scheduled(schedule.copy(), words, tokens, halves, most, ahead) for ahead in AHEAD]

    module = tvm.IRModule({"main": _kernel(spec, tokens, target, words, finish, activation)})
    return Design(tokens, module, spaces, lambda scheduled: _lowered(scheduled, words))


@dataclass(frozen=True)
class _Row:
    """The sums of a panel for one token: what `finish` reads."""

    sums: tirx.Buffer
    panel: tirx.Expr
    row: tirx.Expr

    def __getitem__(self, lane: tirx.Expr) -> tirx.Expr:
        return self.sums[self.panel, self.row, lane]


def _kernel(
    spec: OpSpec, tokens: int, target: Target, words: Words, finish: Finish, activation: Finish | None
) -> tirx.PrimFunc:
    """The definition: blocks `product` and `finish`, and between them `activation` of gated products."""
    bound, lanes, halves = _bound(spec, tokens), words.vectors.lanes, 1 if activation is None else 2
    columns, K = spec.outputs[0].size(-1) // lanes, spec.input("weight").size(-1)
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        _, tensors = bind_arguments(bound, {"weight": stored_weight(spec, target, activation is not None, False)})
        x, w, out = tensors["x"], tensors["weight"], tensors["out"]
        with build.sblock("root"):
            T.reads()
            T.writes()
            sums = build.sblock_alloc_buffer((columns * halves, tokens, lanes), "float32")
            loops = T.grid(tokens, columns, halves, K // words.size, lanes, words.size)
            with loops as (t, c, g, k, lane, half), build.sblock("product"):
                vt, vc, vg, vk, vl, vh = T.axis.remap("SSSRSR", [t, c, g, k, lane, half])
                vp = vc * halves + vg
                with T.init():
                    T.buffer_store(sums, T.float32(0), [vp, vt, vl])
                term = T.Cast("float32", x[vt, vk * words.size + vh]) * T.Cast("float32", w[vp, vk, vl, vh])
                T.buffer_store(sums, sums[vp, vt, vl] + term, [vp, vt, vl])
            if activation is not None:
                active = build.sblock_alloc_buffer((columns, tokens, lanes), "float32")
                with T.grid(tokens, columns, lanes) as (t, c, lane), build.sblock("activation"):
                    vt, vc, vl = T.axis.remap("SSS", [t, c, lane])
                    # All of a column's panels: that an item needs every other one, TVM cannot say.
                    T.reads(sums[vc * halves : vc * halves + halves, vt, vl])
                    T.writes(active[vc, vt, vl])
                    value = activation(tensors, [_Row(sums, vc * halves, vt)], vt, vc * lanes)(vl)
                    T.buffer_store(active, value, [vc, vt, vl])
            with T.grid(tokens, columns, lanes) as (t, c, lane), build.sblock("finish"):
                vt, vc, vl = T.axis.remap("SSS", [t, c, lane])
                totals = [_Row(sums, vc * halves + g, vt) for g in range(halves)]
                if activation is not None:
                    totals[0] = _Row(active, vc, vt)
                    T.reads(active[vc, vt, vl], sums[vc * halves : vc * halves + halves, vt, vl])
                    T.writes(out[vt, vc * lanes + vl])
                value = finish(tensors, totals, vt, vc * lanes)(vl)
                T.buffer_store(out, T.Cast(bound.outputs[0].dtype, value), [vt, vc * lanes + vl])
    return builder.get()


def _bound(spec: OpSpec, tokens: int) -> OpSpec:
    """The call with its number of tokens."""

    def bind(tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, shape=tuple(tokens if dim == Sym.TOKENS else dim for dim in tensor.shape))

    inputs = tuple((name, bind(tensor)) for name, tensor in spec.inputs)
    return replace(spec, inputs=inputs, outputs=tuple(map(bind, spec.outputs)))


def _scheduled(s: Schedule, words: Words, tokens: int, halves: int, most_columns: int, ahead: int) -> Schedule:
    """One space: all there is to decide is sampled, the rest is the same for all."""
    product = s.get_sblock("product")
    after = [s.get_sblock(name) for name in (("finish",) if halves == 1 else ("activation", "finish"))]
    t, c, g, k, lane, half = s.get_loops(product)
    item, column = s.split(c, s.sample_perfect_tile(c, 2, max_innermost_factor=most_columns))
    step, word = s.split(k, s.sample_perfect_tile(k, 2, max_innermost_factor=MOST_WORDS))
    s.reorder(item, step, word, column, g, t, lane, half)
    s.parallel(item)
    for block in after:
        s.reverse_compute_at(block, item, preserve_unit_loops=True)
    zero = s.decompose_reduction(product, step)
    for block in (zero, *after):
        _, *unrolled, vector = s.get_loops(block)
        for loop in unrolled:
            s.unroll(loop)
        s.vectorize(vector)
    for loop in (word, column, g):
        s.unroll(loop)
    s.tensorize(t, dot_intrinsic(words, tokens, ahead))
    return s


def _lowered(module: tvm.IRModule, words: Words) -> tirx.PrimFunc:
    """The kernel with what each work item keeps at its size, on the stack of its thread."""
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),  # the next one reads plain ramps only
        s_tir.transform.CompactBufferAllocation(),
    ]
    kernel = tvm.transform.Sequential(passes)(module)["main"]
    source = tvm.ir.StringImm(words.vectors.ir)
    return kernel.with_body(tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", source, _on_stack(kernel.body)))


def _on_stack(stmt: tirx.Stmt) -> tirx.Stmt:
    """The loops around a block that allocates buffers, these being `stack` memory: the runtime would be asked."""
    if isinstance(stmt, tirx.For):
        return tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, _on_stack(stmt.body))
    if isinstance(stmt, s_tir.SBlockRealize):
        return s_tir.SBlockRealize(stmt.iter_values, stmt.predicate, _on_stack(stmt.block))
    assert isinstance(stmt, s_tir.SBlock), type(stmt)
    if not stmt.alloc_buffers:
        body = _on_stack(stmt.body)
    else:
        body = stmt.body
        for buffer in reversed(stmt.alloc_buffers):
            pointer = tirx.Var("stack", T.handle(buffer.dtype).ty)
            size = prod(int(extent) for extent in buffer.shape)
            declared = tirx.DeclBuffer(buffer, data=pointer)
            body = tirx.SeqStmt([tirx.Bind(pointer, stack(size, buffer.dtype)), declared, body])
    return s_tir.SBlock(stmt.iter_vars, stmt.reads, stmt.writes, stmt.name_hint, body)
