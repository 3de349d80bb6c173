"""Any elementwise expression: a thread computes eight neighbours of a row of the result from what the inputs hold.

Bytes per token: those of the inputs that are read and of the result, once each.  Slices, permutations and
concatenations are changes of an index; what lies side by side in memory is read 16 bytes at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from tvm import tirx
from tvm.ir import Range
from tvm.script import tirx as T
from tvm.sym.analyzer import Analyzer

from vllm_compile.expression import Expression, Node, read_expression
from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..evaluator import Evaluator, Index
from ..family import Config, KernelFamily
from .launch import Launch, kernel
from .norm import VECTOR

MOST_THREADS = 256
TYPES = {"bfloat16": "__nv_bfloat16", "float32": "float"}
# In C++, by the names of `vllm_compile.expression`; expression.cuh has those that CUDA has not.
FUNCTIONS: Mapping[str, str] = {
    "abs": "fabsf({0})",
    "exp": "expf({0})",
    "gelu": "gelu({0})",
    "gelu_tanh": "gelu_tanh({0})",
    "negative": "-{0}",
    "relu": "({0} < 0.f ? 0.f : {0})",
    "rsqrt": "rsqrtf({0})",
    "sigmoid": "sigmoid({0})",
    "silu": "{0} * sigmoid({0})",
    "sqrt": "sqrtf({0})",
    "square": "{0} * {0}",
    "tanh": "tanhf({0})",
    "add": "{0} + {1}",
    "divide": "{0} / {1}",
    "maximum": "({0} < {1} ? {1} : {0})",
    "minimum": "({1} < {0} ? {1} : {0})",
    "multiply": "{0} * {1}",
    "subtract": "{0} - {1}",
}
INFIX = {tirx.Add: "+", tirx.Sub: "-", tirx.Mul: "*", tirx.FloorDiv: "/", tirx.FloorMod: "%", tirx.LT: "<"}
CALLS = {tirx.Min: "least", tirx.Max: "most"}


@dataclass(frozen=True)
class Elementwise(KernelFamily):
    """`elementwise` for every expression of bf16 and float32 tensors."""

    name: str = "cuda.elementwise"
    op: str = "elementwise"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        tensors = [*(tensor for _, tensor in spec.inputs), *spec.outputs]
        return all(tensor.dtype in TYPES and tensor.shape for tensor in tensors)

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        source = _Source(spec)
        names = [*(name for name, _ in spec.inputs), "out"]
        return kernel(
            spec,
            "expression.cuh",
            source.name,
            lambda call: Launch([call.dims[Sym.TOKENS] * source.blocks], source.threads),
            lambda call: [*map(call.data, names)],
            source=source.text,
        )


class _Source:
    """The device function of a call.

    Attributes:
        items: work items of a token, a thread's each.
        threads, blocks: of a thread block, and how many of these a token has; they are neighbours in the grid.
        name: of the function, by its content.
        text: its C++.
    """

    def __init__(self, spec: OpSpec) -> None:
        expression = read_expression(spec.attribute("expression"))
        (out,) = spec.outputs
        *middle, last = out.sizes()[1:] or [1]
        count = VECTOR if last % VECTOR == 0 else 1
        extents = [*middle, last // count]
        self.items = prod(extents)
        self.threads = min(max(-(-self.items // 32) * 32, 32), MOST_THREADS)
        self.blocks = -(-self.items // self.threads)
        analyzer, token = Analyzer(), tirx.Var("token", "int64")
        place = [tirx.Var(f"i{axis}", "int64") for axis in range(len(extents))]
        for var, extent in zip(place, extents, strict=True):
            analyzer.bind(var, Range.from_min_extent(T.int64(0), T.int64(extent)))
        lead = [T.int64(0)] * (len(expression[-1].shape) - len(out.shape))

        def index(lane: tirx.Expr) -> list[tirx.Expr]:
            return [*lead, token, *place[:-1], place[-1] * count + lane][: len(lead) + len(out.shape)]

        values = _CppEvaluator(expression, dict(spec.inputs), analyzer, count)
        result = values.value(len(expression) - 1, index)
        at = _offset([token, *place[:-1], place[-1] * count], [1, *middle, last], analyzer)
        lines = [
            *(f"const int i{axis} = item / {prod(extents[axis + 1 :])} % {n};" for axis, n in enumerate(extents)),
            *values.lines,
            f"store_row(out + {_text(at)}, {result});",
        ]
        parameters = [f"const {TYPES[tensor.dtype]}* {name}" for name, tensor in spec.inputs]
        parameters.append(f"{TYPES[out.dtype]}* out")
        body = f"({', '.join(parameters)}) {{\n  launch_dependents();\n  wait_for_kernels_before();\n"
        body += f"  const int64_t token = blockIdx.x / {self.blocks};\n"
        body += f"  const int item = blockIdx.x % {self.blocks} * {self.threads} + threadIdx.x;\n"
        body += f"  if (item >= {self.items}) return;\n"
        body += "".join(f"  {line}\n" for line in lines) + "}\n"
        self.name = f"expression_{hashlib.sha256(body.encode()).hexdigest()[:16]}"
        function = f"__device__ __forceinline__ void {self.name}{body}"
        # Calls that differ in unit axes alone may have the same.
        self.text = f"#ifndef HAS_{self.name}\n#define HAS_{self.name}\n"
        self.text += f"namespace vllm_compile {{\n{function}}}\n#endif\n"


class _CppEvaluator(Evaluator[str]):
    """A value is the name of an array of floats; `lines` are the statements that compute them."""

    def __init__(self, expression: Expression, inputs: Mapping, analyzer: Analyzer, count: int) -> None:
        super().__init__(expression, analyzer, count)
        self._inputs = inputs
        self._arrays = 0
        self.lines: list[str] = []

    def load(self, node: Node, index: Index) -> str:
        name = node.parameters[0]
        shape = self._inputs[name].shape

        def offset(lane: tirx.Expr) -> tirx.Expr:
            # The leading unit axes of the model's batch are not in memory.
            where = list(index(lane))
            return _offset(where[len(where) - len(shape) :], shape, self._analyzer)

        first = offset(T.int64(0))
        side_by_side = self._analyzer.can_prove(offset(self._lane) - first == self._lane)
        if self._count == VECTOR and side_by_side and self._analyzer.can_prove(T.floormod(first, VECTOR) == 0):
            array = self._array()
            self.lines.append(f"load_row({array}, {name} + {_text(first)});")
            return array
        return self._lanes(f"wide({name}[{_text(offset(self._lane))}])")

    def constant(self, number: float) -> str:
        return self._lanes(f"{float(number)!r}f")

    def apply(self, node: Node, operands: Sequence[str]) -> str:
        values = [f"{operand}[lane]" for operand in operands]
        if node.op == "cast":
            result = values[0]
        elif node.op == "power":
            result = " * ".join(values * node.parameters[0])
        else:
            result = FUNCTIONS[node.op].format(*values)
        return self._lanes(result if node.dtype == "float32" else f"rounded({result})")

    def select(self, first: Callable[[tirx.Expr], tirx.Expr], a: str, b: str) -> str:
        return self._lanes(f"{_text(self._analyzer.simplify(first(self._lane)))} ? {a}[lane] : {b}[lane]")

    def _lanes(self, value: str) -> str:
        array = self._array()
        self.lines += ["#pragma unroll", f"for (int lane = 0; lane < {self._count}; lane++) {array}[lane] = {value};"]
        return array

    def _array(self) -> str:
        self._arrays += 1
        self.lines.append(f"float v{self._arrays}[{self._count}];")
        return f"v{self._arrays}"


def _offset(index: Sequence[tirx.Expr], shape: Sequence[int | Sym], analyzer: Analyzer) -> tirx.Expr:
    """Where an element lies in memory; the first axis may be bound at each call."""
    flat: tirx.Expr = T.int64(0)
    for i, (where, dim) in enumerate(zip(index, shape, strict=True)):
        flat = where if i == 0 else flat * dim + where
    return analyzer.simplify(flat)


def _text(expression: tirx.Expr) -> str:
    """An index, or a comparison of indices, none negative, in C++."""
    if isinstance(expression, tirx.Var):
        return str(expression.name)
    if isinstance(expression, tirx.IntImm):
        return str(int(expression))
    a, b = _text(expression.a), _text(expression.b)
    if type(expression) in CALLS:
        return f"{CALLS[type(expression)]}({a}, {b})"
    return f"({a} {INFIX[type(expression)]} {b})"
