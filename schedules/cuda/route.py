"""The router of a mixture of experts: its linear layer of few rows, then the choice and the sort by expert.

Bytes: of the linear layer E * K * 2 of weights, from L2 for all tokens but the first; of the router T * E * 2 of logits
and T * k * 16 of results.  Both are latency alone in decode: Mixtral's (E = 8, K = 4096) 64 KB and a few bytes.

A choice of 8 in 128 experts is about a thousand instructions of a warp: one multiprocessor would need 1.2 ms for 8,192
tokens at 4 a cycle.  So thread blocks of 64 tokens share them.  One of these sorts, some 80 instructions of a warp for
32 entries, twice: 65,536 entries are 50 us, beside milliseconds of experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily, Variant, Vendor
from .expression import TYPES
from .launch import Call, Launch, kernel
from .norm import VECTOR

MOST_ROWS = 256  # of a weight for RowLinear, and experts of a router: one block's shared memory counts them
MOST_CHOSEN = 32  # by a token: a lane each
VENDOR_TOKENS = 65
WARPS = {1: 4, 33: 32}  # of a block that chooses and sorts, by the least tokens
BLOCK_TOKENS = 64  # that one thread block chooses for, while there are multiprocessors


@dataclass(frozen=True)
class RowLinear(KernelFamily):
    """`linear` of bf16 weights [N, 8 * n] of up to 256 rows, any number: what tensor cores' tiles do not serve."""

    name: str = "cuda.row_linear"
    op: str = "linear"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        weight = spec.input("weight")
        dtypes = {tensor.dtype for _, tensor in spec.inputs}
        return dtypes == {"bfloat16"} and weight.size(0) <= MOST_ROWS and weight.size(1) % VECTOR == 0

    def vendor(self, spec: OpSpec, target: CudaTarget) -> Vendor:
        return Vendor("linear", VENDOR_TOKENS)

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        N, K = spec.input("weight").size(0), spec.input("weight").size(1)
        warps = min(N, 8)
        return kernel(
            spec,
            "row_linear.cuh",
            f"row_linear<{N}, {K}, {warps}>",
            lambda call: Launch([call.dims[Sym.TOKENS]], 32 * warps),
            lambda call: [*map(call.data, ("x", "weight", "bias", "residual", "out"))],
        )


@dataclass(frozen=True)
class Route(KernelFamily):
    """`route` by a softmax over up to 256 experts, without bias or groups."""

    name: str = "cuda.route"
    op: str = "route"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        logits = spec.input("logits")
        fits = logits.size(1) <= MOST_ROWS and spec.attribute("top_k") <= MOST_CHOSEN
        return fits and logits.dtype in TYPES and not spec.has_input("bias")

    def variants(self, spec: OpSpec, target: CudaTarget) -> Sequence[Variant]:
        return [Variant(least, {"warps": warps}) for least, warps in WARPS.items()]

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        logits, warps = spec.input("logits"), config["warps"]
        E, normalise = logits.size(1), str(bool(spec.attribute("normalise"))).lower()

        def launch(call: Call) -> Launch:
            blocks = T.min(T.ceildiv(call.dims[Sym.TOKENS], BLOCK_TOKENS), target.multiprocessors)
            return Launch([blocks], 32 * warps, (warps + 2) * E * 4)

        return kernel(
            spec,
            "route.cuh",
            f"route<{E}, {spec.attribute('top_k')}, {normalise}, {warps}>",
            launch,
            lambda call: [
                *map(call.data, ("logits", "out_0", "out_1", "out_2", "out_3")),
                T.Cast("int32", call.dims[Sym.TOKENS]),
            ],
        )
