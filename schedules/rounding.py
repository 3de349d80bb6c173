"""Rounding in the middle of an expression.

TVM computes bf16 expressions in float32 and rounds only where a tensor is stored: a cast to bfloat16
and back inside an expression disappears.  Where the model rounds, `rounded` does it with integers.
"""

from tvm import tirx
from tvm.script import tirx as T


def rounded(value: tirx.Expr, dtype: str) -> tirx.Expr:
    """The float32 `value`, scalar or vector, as a tensor of `dtype` holds it (nearest, ties to even), again float32."""
    if dtype == "float32":
        return value
    assert dtype == "bfloat16", dtype
    lanes = value.ty.dtype.lanes
    float_type, bits_type = (f"{base}x{lanes}" if lanes > 1 else base for base in ("float32", "uint32"))

    def splat(number: int) -> tirx.Expr:
        return T.broadcast(T.uint32(number), lanes) if lanes > 1 else T.uint32(number)

    bits = T.reinterpret(bits_type, value)
    last_kept = T.bitwise_and(T.shift_right(bits, splat(16)), splat(1))
    return T.reinterpret(float_type, T.bitwise_and(bits + (splat(0x7FFF) + last_kept), splat(0xFFFF0000)))
