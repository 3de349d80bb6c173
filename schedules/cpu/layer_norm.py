"""LayerNorm: row by row, three times over each, the second and the third time from the L1 cache.

Bytes per row of D values of `size` bytes: 2 * D * size; some 7 floating-point operations per value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from ..arguments import bind_arguments
from ..family import Config, KernelFamily, Variant
from .norm import PARALLEL_ROWS, pairwise_sum


def layer_norm(spec: OpSpec, lanes: int, parallel: bool) -> tirx.PrimFunc:
    """x [T, ..., D], maybe weight [D], maybe bias [D] -> [T, ..., D]."""
    x_spec, width = spec.input("x"), spec.input("x").size(-1)
    rows_per_token = math.prod(x_spec.sizes()[1:-1])
    chunk = math.gcd(width, 4 * lanes)
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        tokens, tensors = bind_arguments(spec)
        x, out = (
            T.decl_buffer((tokens * (rows_per_token * width),), x_spec.dtype, data=tensors[name].data)
            for name in ("x", "out")
        )
        with (T.parallel if parallel else T.serial)(0, tokens * rows_per_token) as row:
            sums = T.alloc_buffer((chunk,), "float32")

            def values(each):
                with T.serial(0, T.int64(width // chunk)) as i, T.vectorized(0, T.int64(chunk)) as j:
                    each(i * chunk + j, j)

            def load(column):
                return T.Cast("float32", x[row * width + column])

            def mean_of(value):
                with T.vectorized(0, T.int64(chunk)) as j:
                    T.buffer_store(sums, T.float32(0), [j])
                values(lambda column, j: T.buffer_store(sums, sums[j] + value(column), [j]))
                return T.Bind(pairwise_sum(sums, chunk) / T.float32(width))

            mean = mean_of(load)
            variance = mean_of(lambda column: (load(column) - mean) * (load(column) - mean))
            inverse = T.Bind(T.float32(1) / T.sqrt(variance + T.float32(spec.attribute("eps"))))

            def store(column, _):
                value = (load(column) - mean) * inverse
                if "weight" in tensors:
                    value = value * T.Cast("float32", tensors["weight"][column])
                if "bias" in tensors:
                    value = value + T.Cast("float32", tensors["bias"][column])
                T.buffer_store(out, T.Cast(x_spec.dtype, value), [row * width + column])

            values(store)
    return builder.get()


@dataclass(frozen=True)
class LayerNorm(KernelFamily):
    """`layer_norm` for every width and dtype."""

    name: str = "cpu.layer_norm"
    op: str = "layer_norm"

    def serves(self, spec: OpSpec, target: Target) -> bool:
        return spec.op == self.op

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        return (Variant(1, {"parallel": False}), Variant(PARALLEL_ROWS, {"parallel": True}))

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        return layer_norm(spec, target.vector_lanes, config["parallel"])
