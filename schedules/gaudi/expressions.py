"""Norms, rotation and gates as expressions: TPC kernels are generated from them, torch evaluates them elsewhere.

Roundings are those of the operators' references.  The last axis lies on a TPC's vector lanes, so halves of a row that
are combined (a gate and its up, the two halves of a head) are an axis of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vllm_compile.expression import Expression, Node
from vllm_compile.spec import Dim, OpSpec, Sym

T = Sym.TOKENS


class Fused(NamedTuple):
    """An expression with the nodes that are its results."""

    nodes: Expression
    results: tuple[int, ...]


class _Builder:
    """Collects nodes; each method returns the new node's number."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def input(self, name: str, shape: tuple[Dim, ...], dtype: str) -> int:
        return self._add("input", (), shape, dtype, name)

    def constant(self, value: float, dtype: str) -> int:
        return self._add("constant", (), (), dtype, value)

    def cast(self, a: int, dtype: str) -> int:
        return self._add("cast", (a,), self.nodes[a].shape, dtype)

    def apply(self, op: str, a: int, b: int | None = None) -> int:
        """A unary or binary operator in its first operand's dtype; the second is broadcast."""
        operands = (a,) if b is None else (a, b)
        return self._add(op, operands, self.nodes[a].shape, self.nodes[a].dtype)

    def mean(self, a: int) -> int:
        return self._add("mean", (a,), (*self.nodes[a].shape[:-1], 1), self.nodes[a].dtype)

    def part(self, a: int, axis: int, begin: int, size: int) -> int:
        """Indices `begin` to `begin + size` of an axis."""
        shape = list(self.nodes[a].shape)
        shape[axis] = size
        starts = [(begin if i == axis else 0, 1) for i in range(len(shape))]
        return self._add("slice", (a,), tuple(shape), self.nodes[a].dtype, *starts)

    def concat(self, a: int, b: int, axis: int) -> int:
        shape = list(self.nodes[a].shape)
        shape[axis] = int(shape[axis]) + int(self.nodes[b].shape[axis])
        return self._add("concat", (a, b), tuple(shape), self.nodes[a].dtype, axis)

    def _add(self, op: str, operands: tuple[int, ...], shape: tuple[Dim, ...], dtype: str, *parameters: Any) -> int:
        self.nodes.append(Node(op, operands, shape, dtype, parameters))
        return len(self.nodes) - 1


def rms_norm(spec: OpSpec) -> Fused:
    """x [T, D] -> [T, D]; with a residual (add_rms_norm) the sum too, which comes first."""
    b = _Builder()
    x_spec, weight_spec = spec.input("x"), spec.input("weight")
    dtype, width = x_spec.dtype, weight_spec.size(0)
    x = b.input("x", (T, width), dtype)
    results = []
    if spec.has_input("residual"):
        x = b.apply("add", b.input("residual", (T, width), dtype), x)
        results.append(x)
    wide = b.cast(x, "float32")
    variance = b.apply("add", b.mean(b.apply("square", wide)), b.constant(spec.attribute("eps"), "float32"))
    normed = b.cast(b.apply("multiply", wide, b.apply("rsqrt", variance)), weight_spec.dtype)
    scaled = b.apply("multiply", normed, b.input("weight", (width,), weight_spec.dtype))
    results.append(b.cast(scaled, dtype))
    return Fused(tuple(b.nodes), tuple(results))


def layer_norm(spec: OpSpec) -> Fused:
    """x [T, D] -> [T, D], all of it in float32."""
    b = _Builder()
    dtype, width = spec.input("x").dtype, spec.input("x").size(-1)
    wide = b.cast(b.input("x", (T, width), dtype), "float32")
    centred = b.apply("subtract", wide, b.mean(wide))
    variance = b.mean(b.apply("square", centred))
    scale = b.apply("rsqrt", b.apply("add", variance, b.constant(spec.attribute("eps"), "float32")))

    def vector(name: str) -> int:
        return b.cast(b.input(name, (width,), spec.input(name).dtype), "float32")

    result = b.apply("multiply", centred, scale)
    if spec.has_input("weight"):
        result = b.apply("multiply", result, vector("weight"))
    if spec.has_input("bias"):
        result = b.apply("add", result, vector("bias"))
    result = b.cast(result, dtype)
    return Fused(tuple(b.nodes), (result,))


def silu_mul(width: int, dtype: str) -> Fused:
    """x [T, 2, I], gates then ups -> silu(gate) * up [T, 1, I]; silu is rounded before it multiplies."""
    b = _Builder()
    x = b.input("x", (T, 2, width), dtype)
    gate, up = b.part(x, 1, 0, 1), b.part(x, 1, 1, 1)
    result = b.apply("multiply", b.apply("silu", gate), up)
    return Fused(tuple(b.nodes), (result,))


def rotate(heads: int, all_heads: int, head_dim: int, dtype: str) -> Fused:
    """The first `heads` of x [T, A, 2, D/2] rotated (Su et al. 2021, halves of a head) by cos, sin [T, 1, 2, D/2].

    Each product is rounded before the sum, as in Hugging Face.
    """
    b = _Builder()
    half = head_dim // 2
    x = b.part(b.input("qkv", (T, all_heads, 2, half), dtype), 1, 0, heads)
    cos, sin = (b.input(name, (T, 1, 2, half), dtype) for name in ("cos", "sin"))
    turned = b.concat(b.apply("negative", b.part(x, 2, 1, 1)), b.part(x, 2, 0, 1), 2)
    total = b.apply("add", b.apply("multiply", x, cos), b.apply("multiply", turned, sin))
    return Fused(tuple(b.nodes), (total,))
