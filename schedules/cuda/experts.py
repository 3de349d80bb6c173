"""Linear layers of experts: each token is multiplied by the weights of the experts that it goes to (expert_linear.cuh).

Tokens of one expert are a group, as `route` has sorted them; a group's weight is streamed once for every so many of its
tokens, a tile, by the kernels of dense layers (stream.py, wide.py).  The grid has a place for each tile that there may
be (rows.cuh): min(T * k, E) first ones of groups, and of tiles of W tokens (T * k - 1) / W further ones.  Places
without a tile end at once.  Qwen3-30B-A3B, 8,192 tokens of even shares, W = 64: 1,151 places for 1,024 tiles.

Roofline.  Of G groups G * N * K * 2 bytes, 2 * T * k * N * K operations.  Mixtral-8x7B's gates and ups (N = 28672,
K = 4096, k = 2), one token: 470 MB of the 1.88 GB there are, 98 us at 4.8 TB/s.  From some 64 tokens a group on, the
weights of a group come again for each 64 tokens, from memory or L2: 2 * 64 operations for 2 bytes, at 4.8 TB/s 310
TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile import lossless
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily, Variant
from . import matmul, stream, wide
from .launch import Call, Launch, kernel

MOST_EXPERTS = 256
WIDTHS = (8, 16, 32, 64)  # tokens of a group that read its weight together
LAST = 512  # from so many tokens on there is one variant


class _ExpertFamily(KernelFamily):
    """Up to 256 experts of bf16 weights [E, 16 * a, 64 * b]; gated: each half in whole tiles."""

    gated: bool

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        one, rows = _one_expert(spec), lossless.TILE * (2 if self.gated else 1)
        fits = matmul.serves(one) and one.input("weight").size(0) % rows == 0
        return fits and spec.input("weight").size(0) <= MOST_EXPERTS

    def variants(self, spec: OpSpec, target: CudaTarget) -> Sequence[Variant]:
        """Weights are read once for twice as many tokens as a group has on average, of 8 to 64."""
        one, experts, top_k = _one_expert(spec), spec.input("weight").size(0), spec.input("experts").size(1)
        found: list[Variant] = []
        least, most = 1, WIDTHS[0]
        while least <= LAST:
            wanted = min(most, -(-2 * most * top_k // experts))
            width = next((width for width in WIDTHS if width >= wanted), WIDTHS[-1])
            config = _config(one, target, self.gated, width)
            if not found or found[-1].config != config:
                found.append(Variant(least, config))
            least, most = most + 1, 2 * most
        return found

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        experts, N, K = spec.input("weight").sizes()
        top_k, shared = spec.input("experts").size(1), len(spec.input("x").shape) == 2
        kind = matmul.KINDS[config["kind"]]
        assert matmul.fits(_one_expert(spec), config, target, self.gated), (spec, config)

        def launch(call: Call) -> Launch:
            dense, tokens, width = kind.launch(config, call, N), call.dims[Sym.TOKENS], _width(config)
            slots = tokens * top_k
            further = T.if_then_else(tokens > width, T.floordiv(slots - 1, width), 0)  # a token's experts differ
            tiles = T.min(slots, experts) + further
            return Launch([dense.grid[0], tiles], dense.threads, dense.shared_bytes, dense.cluster)

        parameters = [*kind.parameters(config, self.gated), experts, top_k if shared else 1]
        return kernel(
            spec,
            "expert_linear.cuh",
            f"expert_{kind.FUNCTION}<{', '.join(map(str, parameters))}>",
            launch,
            lambda call: [
                *map(call.data, ("x", "experts", "order", "ends", "weight", "out")),
                T.Cast("int32", call.dims[Sym.TOKENS] * top_k),
                N,
                K,
            ],
        )


def _one_expert(spec: OpSpec) -> OpSpec:
    """The linear layer of one expert."""
    x, weight = spec.input("x"), spec.input("weight")
    N, K = weight.sizes()[1:]
    inputs = (("x", TensorSpec((Sym.TOKENS, K), x.dtype)), ("weight", TensorSpec((N, K), weight.dtype)))
    return OpSpec("linear", inputs, (TensorSpec((Sym.TOKENS, N), x.dtype),))


def _config(one: OpSpec, target: CudaTarget, gated: bool, width: int) -> Config:
    """Wide from 32 tokens on, where the weight has whole warpgroups; else streamed, for 16 at most."""
    config = wide.roomy(one, target, gated, width) if width > matmul.STREAM_TOKENS else None
    config = config or stream.default(one, target, False, gated, min(width, matmul.STREAM_TOKENS))
    assert config is not None, one
    return config


def _width(config: Config) -> int:
    """Tokens of a tile."""
    return config["tokens"] if config["kind"] == "wide" else stream.TOKENS * config["token_tiles"]


@dataclass(frozen=True)
class ExpertLinear(_ExpertFamily):
    """`expert_linear`."""

    name: str = "cuda.expert_linear"
    op: str = "expert_linear"
    gated: bool = False


@dataclass(frozen=True)
class ExpertGateUpSilu(_ExpertFamily):
    """`expert_gate_up_silu`."""

    name: str = "cuda.expert_gate_up_silu"
    op: str = "expert_gate_up_silu"
    gated: bool = True
