"""The vector operations of attention: registers of `lanes` values, and dot products of one word per lane.

A *word* is what one lane multiplies in one instruction: two neighbouring bf16 values held in an int32 where
the CPU has vdpbf16ps, one float32 elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.targets import Target
from vllm_compile.targets.cpu import AVX512_BF16

# Functions for LLVM to inline.  `weak_odr` lets several kernels of one library bring their own copy.
_SHARED_IR = """
define weak_odr hidden i32 @vc_fetch_add_one(ptr %counter) alwaysinline nounwind {
  %before = atomicrmw add ptr %counter, i32 1 monotonic
  ret i32 %before
}
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define weak_odr hidden void @vc_prefetch(ptr %line) alwaysinline nounwind {
  call void @llvm.prefetch.p0(ptr %line, i32 0, i32 3, i32 1)
  ret void
}
define weak_odr hidden void @vc_prefetch_l2(ptr %line) alwaysinline nounwind {
  call void @llvm.prefetch.p0(ptr %line, i32 0, i32 2, i32 1)
  ret void
}
"""
_BF16_IR = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define weak_odr hidden <16 x float> @vc_dot_bf16_pairs(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b)
    alwaysinline nounwind {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = tail call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
      <16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
define weak_odr hidden <16 x i16> @vc_round_to_bf16(<16 x float> %x) alwaysinline nounwind {
  %y = fptrunc <16 x float> %x to <16 x bfloat>
  %r = bitcast <16 x bfloat> %y to <16 x i16>
  ret <16 x i16> %r
}
"""
CELL = 128  # bytes of one "tensormap", which LLVM aligns to 64
CACHE_LINE = 64


def scratch(size: int, dtype: str) -> tirx.Buffer:
    """A flat buffer on the stack of the running thread, 64-byte aligned.

    TVM turns an ordinary allocation of 1 KiB or more into a call of its runtime, which the serving process
    lacks; `stack` does not.
    """
    return T.decl_buffer((size,), dtype, data=T.Bind(stack(size, dtype)))


def stack(size: int, dtype: str) -> tirx.Expr:
    """A pointer to `size` values of 4 bytes on the stack: a builtin for CUDA's tensor maps, an alloca of any size."""
    cells = -(-size * 4 // CELL)
    return T.reinterpret(T.handle(dtype).ty, T.tvm_stack_alloca("tensormap", cells))


def prefetch(buffer: tirx.Buffer, index: tirx.Expr, l2: bool = False) -> None:
    """Ask for the cache line of an element to be brought into the L1 cache, or L2; a hint, never a fault."""
    T.evaluate(T.call_extern("void", "vc_prefetch_l2" if l2 else "vc_prefetch", T.address_of(buffer[index])))


@dataclass(frozen=True)
class Vectors:
    """Vector arithmetic of one target: `lanes` float32 per register, and whether words are bf16 pairs."""

    lanes: int
    pairs: bool

    @staticmethod
    def of(target: Target, dtype: str, head_dim: int) -> Vectors:
        # A transposed block of K is lanes x lanes words, so that a head must have as many.
        pairs = dtype == "bfloat16" and target.has(AVX512_BF16) and head_dim // 2 >= target.vector_lanes
        return Vectors(target.vector_lanes, pairs)

    @property
    def ir(self) -> str:
        return _SHARED_IR + (_BF16_IR if self.pairs else "")

    @property
    def values_per_word(self) -> int:
        return 2 if self.pairs else 1

    @property
    def word(self) -> str:
        return "int32" if self.pairs else "float32"

    @property
    def one(self) -> tirx.Expr:
        """A word whose dot product with a word adds up the latter's values, in every lane."""
        return self.splat(T.int32(0x3F803F80) if self.pairs else T.float32(1))

    def splat(self, scalar) -> tirx.Expr:
        return T.broadcast(T.float32(scalar) if isinstance(scalar, float) else scalar, self.lanes)

    def load(self, buffer: tirx.Buffer, offset=0) -> tirx.Expr:
        return buffer.vload([offset], f"{buffer.dtype}x{self.lanes}")

    def store(self, buffer: tirx.Buffer, value: tirx.Expr, offset=0) -> None:
        T.buffer_store(buffer, value, [T.ramp(offset, 1, self.lanes)])

    def for_each(self, count: int, body: Callable[[tirx.Expr], None]) -> None:
        """Emit `body(i)` for i < count, a multiple of 16, in vectors of 16 scalars."""
        with T.serial(0, count // 16) as chunk, T.vectorized(0, 16) as lane:
            body(chunk * 16 + lane)

    def register(self, value=0.0) -> tirx.Buffer:
        """A vector variable that starts as `value`."""
        variable = T.alloc_buffer((self.lanes,), "float32")
        self.store(variable, self.splat(value) if isinstance(value, float) else value)
        return variable

    def fma(self, a: tirx.Expr, b: tirx.Expr, c: tirx.Expr) -> tirx.Expr:
        """a * b + c, rounded once."""
        return T.call_llvm_pure_intrin(f"float32x{self.lanes}", "llvm.fma", a, b, c)

    def dot(self, words_a: tirx.Expr, words_b: tirx.Expr, total: tirx.Expr) -> tirx.Expr:
        """total + the products of the values of each lane's words."""
        if not self.pairs:
            return self.fma(words_a, words_b, total)
        return T.call_pure_extern("float32x16", "vc_dot_bf16_pairs", total, words_a, words_b)

    def to_bf16(self, values: tirx.Expr) -> tirx.Expr:
        """float32 to the bits of bf16, to nearest even."""
        return T.call_pure_extern("uint16x16", "vc_round_to_bf16", values)

    def pair(self, low: tirx.Expr, high: tirx.Expr) -> tirx.Expr:
        """The bits of two bf16 vectors as one vector of words."""
        wide = f"uint32x{self.lanes}"
        return T.reinterpret(
            f"int32x{self.lanes}",
            T.bitwise_or(T.Cast(wide, low), T.shift_left(T.Cast(wide, high), T.broadcast(T.uint32(16), self.lanes))),
        )

    def maximum(self, vector: tirx.Expr) -> tirx.Expr:
        """The largest lane."""
        return T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fmax", vector)

    def transpose(self, rows: list[tirx.Expr]) -> list[tirx.Expr]:
        """The columns of the matrix whose rows are `lanes` vectors, in log2(lanes) rounds of shuffles."""
        step = self.lanes // 2
        while step:
            mixed = list(rows)
            for i in range(self.lanes):
                if not i & step:
                    low = [j if not j & step else self.lanes + j - step for j in range(self.lanes)]
                    high = [j + step if not j & step else self.lanes + j for j in range(self.lanes)]
                    mixed[i] = T.Bind(tirx.Shuffle([rows[i], rows[i + step]], low))
                    mixed[i + step] = T.Bind(tirx.Shuffle([rows[i], rows[i + step]], high))
            rows = mixed
            step //= 2
        return rows
