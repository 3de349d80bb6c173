"""What each operator costs in a step: FLOPs, and bytes of weights, of the KV cache and of activations.

An operator reads its inputs and writes its results once, which is what a fused kernel does whose tiles fit the
caches.  A multiply-add is two FLOPs.  FLOPs outside matrix products are nominal: each arithmetic operation or
function of one element is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Protocol

from vllm_compile.errors import UnsupportedError
from vllm_compile.expression import BINARY, UNARY, read_expression
from vllm_compile.fused_calls import parts
from vllm_compile.relax_passes.outline_layers import LOGITS
from vllm_compile.spec import DTYPE_BYTES, OpSpec, Sym, TensorSpec

from .graph import Call

GATE_FLOPS = 3  # of one element of silu(gate) * up
BLOCK_SIZE = 16  # tokens of a block of the paged KV cache; only the size of block tables depends on it


@dataclass(frozen=True)
class Workload:
    """`requests` requests, each with `queries` new tokens behind `cached` tokens of the KV cache."""

    requests: int
    queries: int
    cached: int

    @property
    def tokens(self) -> int:
        return self.requests * self.queries

    @property
    def length(self) -> int:
        """Tokens of a request, this step's included."""
        return self.cached + self.queries

    def pairs(self, window: int = 0) -> int:
        """(query, position) pairs that causal attention scores; a query sees its last `window` positions, or all."""
        first, last = self.cached + 1, self.length  # positions that the first and the last query see
        if window:
            full = max(0, last - max(window, first - 1))  # queries that see a whole window
            return self.requests * (full * window + _sum(first, last - full))
        return self.requests * _sum(first, last)

    def read(self, window: int = 0) -> int:
        """Cached tokens that attention reads: each one once, however many queries and heads see it."""
        return self.requests * (min(self.length, window + self.queries - 1) if window else self.length)


def _sum(first: int, last: int) -> int:
    return (first + last) * (last - first + 1) // 2 if last >= first else 0


@dataclass(frozen=True)
class Cost:
    """FLOPs of matrix products and of the rest, bytes moved, and FLOPs' worth of restoring packed weights."""

    matrix_flops: int = 0
    vector_flops: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    activation_bytes: int = 0
    unpack_flops: int = 0

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.vector_flops

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(value * times for value in self._values()))

    def _values(self) -> tuple[int, ...]:
        moved = (self.weight_bytes, self.kv_bytes, self.activation_bytes)
        return (self.matrix_flops, self.vector_flops, *moved, self.unpack_flops)


class Layout(Protocol):
    """How a weight is stored, as `schedules.layouts.Layout` says it."""

    @property
    def unpack_flops(self) -> float: ...

    def shape(self, plain: tuple[int, ...]) -> tuple[int, ...]: ...

    def dtype(self, plain: str) -> str: ...


@dataclass(frozen=True)
class _Step:
    """A call in a workload, with the sizes that its symbols have there."""

    call: Call
    workload: Workload
    sizes: Mapping[Sym, int]
    layouts: Mapping[str, Layout]

    def elements(self, tensor: TensorSpec) -> int:
        return prod(self.sizes[dim] if isinstance(dim, Sym) else dim for dim in tensor.shape)

    def bytes(self, tensor: TensorSpec) -> int:
        return self.elements(tensor) * DTYPE_BYTES[tensor.dtype]

    def written(self) -> int:
        """Elements of all results."""
        return sum(self.elements(tensor) for tensor in self.call.spec.outputs)

    def weight_bytes(self) -> int:
        """Of all weights, as they are stored."""
        total = 0
        for name in self.call.weights:
            plain = self.call.spec.input(name)
            layout = self.layouts.get(name)
            if layout is not None:
                shape = tuple(plain.size(axis) for axis in range(len(plain.shape)))
                plain = TensorSpec(layout.shape(shape), layout.dtype(plain.dtype))
            total += self.bytes(plain)
        return total

    def unpack_flops(self) -> int:
        """Of all weights, each restored once."""
        stored = ((self.call.spec.input(name), self.layouts.get(name)) for name in self.call.weights)
        return round(sum(self.elements(plain) * layout.unpack_flops for plain, layout in stored if layout is not None))

    def activation_bytes(self) -> int:
        """Of all inputs that are neither weights nor the KV cache, and of all results."""
        spec, weights = self.call.spec, self.call.weights
        read = (tensor for name, tensor in spec.inputs if name not in weights and not tensor.strided)
        return sum(map(self.bytes, (*read, *(out for out in spec.outputs if not out.strided))))

    def moved(self, matrix_flops: int = 0, vector_flops: int = 0, kv_bytes: int = 0) -> Cost:
        """The cost of an operator that reads its inputs and writes its results once."""
        moved = (self.weight_bytes(), kv_bytes, self.activation_bytes())
        return Cost(matrix_flops, vector_flops, *moved, self.unpack_flops())


def rows_of(call: Call, workload: Workload) -> int:
    """Tokens that a call works on: logits are wanted of one token a request, all else of every token."""
    return workload.requests if call.function == LOGITS else workload.tokens


def step_cost(call: Call, workload: Workload, layouts: Mapping[str, Layout] | None = None) -> Cost:
    """The cost of one execution of `call`; `layouts` says how its weights are stored (default: plain).

    Raises:
        UnsupportedError: the operator's cost is not known; it is named.
    """
    sizes = {
        Sym.TOKENS: rows_of(call, workload),
        Sym.REQUESTS: workload.requests,
        Sym.BOUNDARIES: workload.requests + 1,
        Sym.TABLE_WIDTH: -(-workload.length // BLOCK_SIZE),
    }
    if call.op not in COSTS:
        raise UnsupportedError(f"analysis does not know what operator {call.op} costs; add it to analysis/cost.py")
    return COSTS[call.op](_Step(call, workload, sizes, layouts or {}))


def _product(step: _Step) -> Cost:
    """x [T, K] and a weight [N, K]: 2 * T * K * N."""
    spec = step.call.spec
    weight = spec.input("weight")
    flops = 2 * step.elements(spec.input("x")) * weight.size(0)
    epilogue = sum(spec.has_input(name) for name in ("bias", "residual")) * step.written()
    return step.moved(matrix_flops=flops, vector_flops=epilogue)


def _head_linear(step: _Step) -> Cost:
    """x [T, H, K] and a weight [H, N, K]: 2 * T * H * K * N."""
    spec = step.call.spec
    return step.moved(matrix_flops=2 * step.elements(spec.input("x")) * spec.input("weight").size(1))


def _gate_up_silu(step: _Step) -> Cost:
    return step.moved(matrix_flops=_product(step).matrix_flops, vector_flops=GATE_FLOPS * step.written())


def gated_parts(call: Call, workload: Workload) -> tuple[Cost, Cost]:
    """A gated product, weights plain, as two kernels, with gates and ups in memory between them: product, and gate."""
    whole = step_cost(call, workload)
    (out,) = call.spec.outputs
    written = rows_of(call, workload) * out.size(-1)
    result = written * DTYPE_BYTES[out.dtype]
    product = Cost(whole.matrix_flops, 0, whole.weight_bytes, 0, whole.activation_bytes + result)
    return product, Cost(vector_flops=GATE_FLOPS * written, activation_bytes=3 * result)


def _paged_attention(step: _Step) -> Cost:
    """Queries with keys, probabilities with values: 2 * D and 2 * DV a score; 4 a score for the softmax."""
    spec, workload = step.call.spec, step.workload
    heads, window = spec.input("q").size(-2), spec.option("window")
    columns = spec.input("q").size(-1) + spec.outputs[0].size(-1)
    scores = heads * workload.pairs(window)
    token = kv_token_bytes(spec)
    return step.moved(2 * columns * scores, 4 * scores, kv_bytes=workload.read(window) * token)


def _qkv_rope_attention(step: _Step) -> Cost:
    """Both its parts, but that the turned queries do not go through memory."""
    rotation, attention = (step_cost(replace(step.call, spec=part), step.workload) for part in parts(step.call.spec))
    return replace(rotation + attention, activation_bytes=step.activation_bytes())


def kv_token_bytes(spec: OpSpec) -> int:
    """Bytes of one token's keys and values in one layer, of a call that reads or writes the KV cache."""
    kv = spec.input("kv")
    return kv.size(1) * kv.size(3) * DTYPE_BYTES[kv.dtype]


def _kv_write(flops: int) -> Callable[[_Step], Cost]:
    return lambda step: step.moved(
        vector_flops=flops * step.written(), kv_bytes=step.workload.tokens * kv_token_bytes(step.call.spec)
    )


def _expert_products(step: _Step) -> Cost:
    """Products of each token's experts [T, k] with their weights [E, N, K].

    The weights of experts that nobody chose are not read: with even routing, E * (1 - (1 - k / E) ** T) experts are.
    """
    spec = step.call.spec
    chosen = spec.input("experts")
    rows, top_k = step.elements(chosen), chosen.size(1)
    weights = [spec.input(name) for name in step.call.weights]
    experts = weights[0].size(0)
    read = 1 - (1 - top_k / experts) ** (rows // top_k)
    return Cost(
        matrix_flops=sum(2 * rows * weight.size(1) * weight.size(2) for weight in weights),
        vector_flops=0 if spec.op == "expert_linear" else GATE_FLOPS * rows * weights[0].size(1) // 2,
        weight_bytes=round(step.weight_bytes() * read),
        activation_bytes=step.activation_bytes(),
    )


def _embedding(step: _Step) -> Cost:
    """Only the rows that are looked up are read."""
    table = step.call.spec.input("table")
    rows = step.elements(step.call.spec.input("ids")) * table.size(1) * DTYPE_BYTES[table.dtype]
    return Cost(weight_bytes=rows, activation_bytes=step.activation_bytes())


def _elementwise(step: _Step) -> Cost:
    nodes = read_expression(step.call.spec.attribute("expression"))
    free = {"input", "constant", "cast", "slice", "concat", "permute", "reshape"}
    operations = sum(step.elements(TensorSpec(node.shape, node.dtype)) for node in nodes if node.op not in free)
    return step.moved(vector_flops=operations)


def _per_result(flops: int) -> Callable[[_Step], Cost]:
    """An operator of so many FLOPs for each element it writes."""
    return lambda step: step.moved(vector_flops=flops * step.written())


def _reduction(step: _Step) -> Cost:
    return step.moved(vector_flops=sum(step.elements(tensor) for _, tensor in step.call.spec.inputs))


def _part(step: _Step) -> Cost:
    """A slice: what it leaves is read, and written."""
    return Cost(activation_bytes=2 * sum(step.bytes(out) for out in step.call.spec.outputs))


ARITHMETIC = UNARY | BINARY | {"clip", "power", "nn.gelu", "nn.gelu_tanh", "nn.relu", "nn.silu"}
COPIES = {"astype", "broadcast_to", "concat", "gather_elements", "permute_dims", "stack"}
PARTS = {"split", "strided_slice"}
REDUCTIONS = {"max", "mean", "nn.softmax", "sum", "topk"}

COSTS: dict[str, Callable[[_Step], Cost]] = {
    "linear": _product,
    "head_linear": _head_linear,
    "gate_up_silu": _gate_up_silu,
    "moe": _expert_products,
    "expert_gate_up_silu": _expert_products,
    "expert_linear": _expert_products,
    "limit_groups": _reduction,
    "route": _reduction,
    "paged_attention": _paged_attention,
    "qkv_rope_attention": _qkv_rope_attention,
    "qkv_rope_cache": _kv_write(3),
    "kv_cache_write": _kv_write(0),
    "embedding": _embedding,
    "elementwise": _elementwise,
    "rms_norm": _per_result(4),  # square and sum, scale twice
    "add_rms_norm": _per_result(3),  # 1 for the sum and 5 for the norm, of two results
    "layer_norm": _per_result(7),  # mean and variance (4), scale twice, bias
    "silu_mul": _per_result(GATE_FLOPS),
    **{f"relax.{name}": _per_result(1) for name in ARITHMETIC},
    **{f"relax.{name}": _per_result(0) for name in COPIES},
    **{f"relax.{name}": _part for name in PARTS},
    **{f"relax.{name}": _reduction for name in REDUCTIONS},
}
