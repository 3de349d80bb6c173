"""What a matrix product multiplies in one step.

A word is one float32, or two bf16 values that are neighbours along K.  Pairs are multiplied by vdpbf16ps
where the CPU has it; elsewhere both values are widened to float32 (whose upper half they are) and
multiplied one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import DTYPE_BYTES, OpSpec
from vllm_compile.targets import Target
from vllm_compile.targets.cpu import AVX512_BF16

from .vectors import Vectors


def serves_dtypes(spec: OpSpec) -> bool:
    """True if all tensors of the call have one dtype, and there are words of it."""
    dtypes = {tensor.dtype for _, tensor in spec.inputs} | {tensor.dtype for tensor in spec.outputs}
    return dtypes in ({"float32"}, {"bfloat16"})


@dataclass(frozen=True)
class Words:
    """How a vector of weight words is multiplied with a word of x."""

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

    @property
    def widened(self) -> bool:
        return self.size == 2 and not self.vectors.pairs

    def view(self, x: tirx.Buffer, size: tirx.Expr) -> tirx.Buffer:
        """x as one flat axis of values to take words from; where K is odd, words lie at odd addresses."""
        value = "uint16" if self.size == 2 else "float32"
        return T.decl_buffer((size,), value, data=x.data, align=DTYPE_BYTES[x.dtype])

    def load(self, x: tirx.Buffer, offset: tirx.Expr) -> tirx.Expr:
        return T.reinterpret("int32", x.vload([offset], "uint16x2")) if self.size == 2 else x[offset]

    def load_half(self, x: tirx.Buffer, offset: tirx.Expr) -> tirx.Expr:
        """One bf16 value paired with zero."""
        return T.Cast("int32", x[offset])

    def value(self, x: tirx.Buffer, offset: tirx.Expr) -> tirx.Expr:
        """One bf16 value as float32, whose upper half it is."""
        return T.reinterpret("float32", T.shift_left(T.Cast("uint32", x[offset]), T.uint32(16)))

    def multiply_add(self, weight: tirx.Expr, x: tirx.Expr, total: tirx.Expr) -> tirx.Expr:
        """total + the product of each lane's words."""
        if not self.widened:
            return self.vectors.dot(weight, x, total)
        for widen in (self._first, self._second):
            total = self.vectors.fma(widen(weight), widen(x), total)
        return total

    def _first(self, word: tirx.Expr) -> tirx.Expr:
        v = self.vectors
        return T.reinterpret(f"float32x{v.lanes}", T.shift_left(word, v.splat(T.int32(16))))

    def _second(self, word: tirx.Expr) -> tirx.Expr:
        v = self.vectors
        return T.reinterpret(f"float32x{v.lanes}", T.bitwise_and(word, v.splat(T.int32(-0x10000))))
