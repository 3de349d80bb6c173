"""Rounding in the middle of an expression.

TVM computes bf16 expressions in float32 and rounds only where a tensor is stored: a cast to bfloat16
and back inside an expression disappears.  Where the model rounds, `rounded` does it with integers.
"""

from tvm import tirx
from tvm.script import tirx as T


def rounded(value: tirx.Expr, dtype: str) -> tirx.Expr:
    """The float32 `value` as a tensor of `dtype` holds it (to nearest, ties to even), again a float32."""
    if dtype == "float32":
        return value
    assert dtype == "bfloat16", dtype
    bits = T.reinterpret("uint32", value)
    last_kept = T.bitwise_and(T.shift_right(bits, T.uint32(16)), T.uint32(1))
    return T.reinterpret("float32", T.bitwise_and(bits + (T.uint32(0x7FFF) + last_kept), T.uint32(0xFFFF0000)))
