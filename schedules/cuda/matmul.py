"""The matrix product of `linear` and `gate_up_silu` for few tokens: y[T, N] = x[T, K] @ w[N, K].T, weights read once.

There are three kinds of kernels: `stream` (stream.py) up to 16 tokens, `wide` (wide.py) from 9 to 64, and `fed`
(fed.py).  Which serves, a record says, else rules: from 9 tokens on `fed` lossless weights and `wide` others, where
rows are enough to fill the chip with large thread blocks.  Beyond 64 cuBLASLt is faster (benchmarks/baseline.md).

Roofline.  N * K * 2 bytes of weights (1.5 if lossless), 2 * T * N * K operations: up to some hundred tokens an H200's
bound is memory, 4.8 TB/s.  Gates and ups of Llama-3.1-8B (28672 x 4096): 235 MB, 49 us; lossless 176 MB, 37 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile import lossless
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, Variant
from . import fed, records, stream, wide
from .launch import Call, kernel

KINDS: dict[str, Any] = {"stream": stream, "wide": wide, "fed": fed}
STREAM_TOKENS = 16  # beyond, x is read from L2 too often
BUCKETS = {1: 8, 9: 16, 17: 32, 33: 64}  # least and most tokens of a variant


def shared_bytes(config: Config) -> int:
    """Shared memory of a thread block."""
    return KINDS[config["kind"]].shared_bytes(config)


def fits(spec: OpSpec, config: Config, target: CudaTarget, gated: bool = False) -> bool:
    """True if a kernel of this configuration can be built."""
    return KINDS[config["kind"]].fits(spec, config, target, gated)


def serves(spec: OpSpec) -> bool:
    """True for bf16 weights of whole blocks; of a gated product, each half in whole tiles."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    return spec.input("x").dtype == spec.input("weight").dtype == "bfloat16" and lossless.serves(N, K)


def space(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool = False) -> Sequence[Config]:
    """Every configuration that can be built, without prefetching."""
    configs = [*stream.space(packed), *wide.space(packed), *fed.space(packed)]
    return [config for config in configs if fits(spec, config, target, gated)]


def promising(spec: OpSpec, target: CudaTarget, packed: bool, min_tokens: int, gated: bool = False) -> Sequence[Config]:
    """The configurations that are worth measuring for the variant from `min_tokens` on."""
    tokens = BUCKETS[min_tokens]
    configs = [*stream.promising(spec, target, packed, gated, tokens)] if tokens <= STREAM_TOKENS else []
    configs += fed.promising(spec, target, packed, gated, tokens)
    if tokens > stream.TOKENS:
        configs += wide.promising(spec, target, packed, gated, tokens)
    # Blocks of every tile, counted as plain weights, that half of L2 holds.
    fit = target.l2_bytes // 2 // (spec.input("weight").size(0) * lossless.BLOCK * 2)
    found = []
    for config in configs:
        rest = max(KINDS[config["kind"]].unstaged_blocks(spec, config), 0)
        parts = config.get("k_groups", 1) * config.get("cluster", 1) * config.get("splits", 1)
        share = fit // parts  # of one part of K
        found += [{**config, "prefetch": blocks} for blocks in sorted({0, min(share, rest)})]
    return found


def admits(
    spec: OpSpec, config: Config, min_tokens: int, target: CudaTarget, packed: bool, gated: bool = False
) -> bool:
    """True for a configuration of the space that takes a variant's tokens, whatever it prefetches."""
    if {**config, "prefetch": 0} not in space(spec, target, packed, gated):
        return False
    if config["kind"] == "fed" and not fed.takes(config, BUCKETS[min_tokens]):
        return False
    blocks = config.get("prefetch", 0)
    if not isinstance(blocks, int):
        return False
    return blocks == 0 or 0 < blocks <= KINDS[config["kind"]].unstaged_blocks(spec, config)


def default_variants(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool = False) -> Sequence[Variant]:
    """The fastest of a search on a GPU where one is recorded (records.py), otherwise a choice by rules.

    A token's result has the same bits in all batches that one variant serves; variants sum in orders of their own.
    None serves more tokens than it is made for: a vendor's product takes over where the next one is missing.
    """
    variants: list[Variant] = []
    for min_tokens, tokens in BUCKETS.items():
        record = records.find(spec, packed, min_tokens, target.chip)
        if variants and record is not None and record.gain_us < 0:
            break
        config = record.config if record is not None else None
        if config is None and tokens > stream.TOKENS:
            config = fed.default(spec, target, packed, gated, tokens) or wide.default(
                spec, target, packed, gated, tokens
            )
        if config is None and tokens <= STREAM_TOKENS:
            config = stream.default(spec, target, packed, gated, tokens)
        if config is None:
            break
        variants.append(Variant(min_tokens, config))
    return variants


def vendor_tokens(variants: Sequence[Variant]) -> int:
    """From so many tokens on a vendor's product takes over: those that no variant is made for."""
    return BUCKETS[variants[-1].min_tokens] + 1


def matmul(spec: OpSpec, config: Config, target: CudaTarget, gated: bool) -> tirx.PrimFunc:
    """The kernel of `spec`: any number of tokens, though made for those of its configuration (of splits: no more)."""
    assert fits(spec, config, target, gated), (spec, config)
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    kind = KINDS[config["kind"]]

    def arguments(call: Call) -> list[Any]:
        tensors = map(call.data, ("x", "weight", "bias", "residual", "out"))
        return [*tensors, T.Cast("int32", call.dims[Sym.TOKENS]), N, K]

    packed = {"weight": TensorSpec((lossless.offsets(N, K)[2],), "uint8")} if config["lossless"] else None
    function = f"{kind.FUNCTION}<{', '.join(kind.parameters(config, gated))}>"
    return kernel(spec, f"{kind.FUNCTION}.cuh", function, lambda call: kind.launch(config, call, N), arguments, packed)
