"""`linear` in plain TIR, for MetaSchedule to search: few tokens, whose number is known, and plain weights in panels.

    sums[panel, t, lane] = sum over words of K: x[t, word] * w[panel, word, lane]; out[t, panel, lane] = finish(sums)

A work item is some neighbouring panels, whose sums stay in registers while K goes by; each sum is one chain of
multiply-adds in the order of K, so that a row has the bits that every other kernel of `cpu.linear` gives it.  What
is searched: panels of an item, words of K without a jump, how far ahead weights are asked for.
Bytes as in linear.py: the bound is memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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


def linear_design(spec: OpSpec, tokens: int, target: Target, finish: Finish) -> Design | None:
    """What there is to search for `tokens` tokens; None where it is not served: ragged panels, or sums that do not
    fit the registers."""
    words, (N, K) = Words.of(target, spec.input("x").dtype), spec.input("weight").sizes()
    registers = (32 if words.vectors.lanes == 16 else 16) * 3 // 4
    if N % words.vectors.lanes or K % words.size or tokens > registers or N * K >= INDEXED:
        return None

    def spaces(schedule: Schedule) -> Sequence[Schedule]:
        return [_scheduled(schedule.copy(), words, tokens, registers // tokens, ahead) for ahead in AHEAD]

    module = tvm.IRModule({"main": _kernel(spec, tokens, target, words, finish)})
    return Design(tokens, module, spaces, lambda scheduled: _lowered(scheduled, words))


@dataclass(frozen=True)
class _Row:
    """The sums of a panel for one token: what `finish` reads."""

    sums: tirx.Buffer
    panel: tirx.Expr
    row: tirx.Expr

    def __getitem__(self, lane: tirx.Expr) -> tirx.Expr:
        return self.sums[self.panel, self.row, lane]


def _kernel(spec: OpSpec, tokens: int, target: Target, words: Words, finish: Finish) -> tirx.PrimFunc:
    """The definition: two blocks, `product` and `finish`."""
    bound, lanes = _bound(spec, tokens), words.vectors.lanes
    N, K = spec.input("weight").sizes()
    grid = (tokens, N // lanes)
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        _, tensors = bind_arguments(bound, {"weight": stored_weight(spec, target, False, False)})
        x, w, out = tensors["x"], tensors["weight"], tensors["out"]
        with build.sblock("root"):
            T.reads()
            T.writes()
            sums = build.sblock_alloc_buffer((N // lanes, tokens, lanes), "float32")
            with T.grid(*grid, K // words.size, lanes, words.size) as (t, p, k, lane, half), build.sblock("product"):
                vt, vp, vk, vl, vh = T.axis.remap("SSRSR", [t, p, k, lane, half])
                with T.init():
                    T.buffer_store(sums, T.float32(0), [vp, vt, vl])
                term = T.Cast("float32", x[vt, vk * words.size + vh]) * T.Cast("float32", w[vp, vk, vl, vh])
                T.buffer_store(sums, sums[vp, vt, vl] + term, [vp, vt, vl])
            with T.grid(*grid, lanes) as (t, p, lane), build.sblock("finish"):
                vt, vp, vl = T.axis.remap("SSS", [t, p, lane])
                value = finish(tensors, [_Row(sums, vp, vt)], vt, vp * lanes)(vl)
                T.buffer_store(out, T.Cast(bound.outputs[0].dtype, value), [vt, vp * lanes + vl])
    return builder.get()


def _bound(spec: OpSpec, tokens: int) -> OpSpec:
    """The call with its number of tokens."""

    def bind(tensor: TensorSpec) -> TensorSpec:
        return replace(tensor, shape=tuple(tokens if dim == Sym.TOKENS else dim for dim in tensor.shape))

    inputs = tuple((name, bind(tensor)) for name, tensor in spec.inputs)
    return replace(spec, inputs=inputs, outputs=tuple(map(bind, spec.outputs)))


def _scheduled(s: Schedule, words: Words, tokens: int, most_panels: int, ahead: int) -> Schedule:
    """One space: all there is to decide is sampled, the rest is the same for all."""
    product, finish = s.get_sblock("product"), s.get_sblock("finish")
    t, p, k, lane, half = s.get_loops(product)
    item, panel = s.split(p, s.sample_perfect_tile(p, 2, max_innermost_factor=most_panels))
    step, word = s.split(k, s.sample_perfect_tile(k, 2, max_innermost_factor=MOST_WORDS))
    s.reorder(item, step, word, panel, t, lane, half)
    s.parallel(item)
    s.reverse_compute_at(finish, item, preserve_unit_loops=True)
    zero = s.decompose_reduction(product, step)
    for block in (zero, finish):
        _, *unrolled, vector = s.get_loops(block)
        for loop in unrolled:
            s.unroll(loop)
        s.vectorize(vector)
    s.unroll(word)
    s.unroll(panel)
    s.tensorize(t, dot_intrinsic(words, tokens, ahead))
    return s


def _lowered(module: tvm.IRModule, words: Words) -> tirx.PrimFunc:
    """The kernel with each work item's sums at their size, on the stack of its thread."""
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
    """The loops around a block that allocates a buffer, the buffer being `stack` memory: the runtime would be asked."""
    if isinstance(stmt, tirx.For):
        return tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, _on_stack(stmt.body))
    if isinstance(stmt, s_tir.SBlockRealize):
        return s_tir.SBlockRealize(stmt.iter_values, stmt.predicate, _on_stack(stmt.block))
    assert isinstance(stmt, s_tir.SBlock), type(stmt)
    if not stmt.alloc_buffers:
        body = _on_stack(stmt.body)
    else:
        (sums,) = stmt.alloc_buffers
        pointer = tirx.Var("stack", T.handle(sums.dtype).ty)
        size = 1
        for extent in sums.shape:
            size *= int(extent)
        body = tirx.SeqStmt(
            [tirx.Bind(pointer, stack(size, sums.dtype)), tirx.DeclBuffer(sums, data=pointer), stmt.body]
        )
    return s_tir.SBlock(stmt.iter_vars, stmt.reads, stmt.writes, stmt.name_hint, body)
