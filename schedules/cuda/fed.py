"""Configurations of `fed_linear` (fed_linear.cuh): thread blocks of 256 rows and all of K, x brought by warps apart.

Where the weight has rows for them, 256 rows keep x's share of what a multiprocessor reads low: 64 tokens are a third of
the lossless weights' bytes.  At 4.8 TB/s a multiprocessor gets a block of 256 x 64 lossless weights every 680 ns, 1,200
cycles.  Of these the tensor cores take 512; each scheduler has 4 warps that unpack, 80 instructions each (the machine
code, without the side list), and one that brings x.  In a wide kernel it is 140 instructions, and all warps wait for
each other once a step.

In flight: each stage holds 24 KB of lossless weights, of the 29 KB a multiprocessor that 4.8 TB/s * 800 ns are.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.script import tirx as T

from vllm_compile import lossless
from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config
from .launch import Call, Launch

FUNCTION = "fed_linear"  # in the header of the same name
ROWS, THREADS = 256, 640  # of a thread block
TOKENS = (16, 32, 64)
STAGES = (2, 4)
LEAST_SHARE = 0.8  # of the multiprocessors, that have a thread block


def shared_bytes(config: Config) -> int:
    """Shared memory of a thread block: places of x, stages of weights; or in the same place the sums; and barriers."""
    vectors = 3 if config["lossless"] else 4
    tokens, stages = config["tokens"], config["stages"]
    return max(stages * (tokens * 128 + 16 * vectors * 512), tokens * (ROWS + 4) * 4) + stages * 16


def fits(spec: OpSpec, config: Config, target: CudaTarget, gated: bool) -> bool:
    """True if a kernel of this configuration can be built: whole thread blocks, and rounds of all stages."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    whole = N % ROWS == 0 and K % (lossless.BLOCK * config["stages"]) == 0
    return whole and shared_bytes(config) <= target.shared_bytes


def space(packed: bool) -> Sequence[Config]:
    """Every configuration there is."""
    return [_config(tokens, stages, packed) for tokens in TOKENS for stages in STAGES]


def promising(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool, tokens: int) -> Sequence[Config]:
    """What is worth measuring for so many tokens: where nearly each multiprocessor gets a thread block."""
    rounds = spec.input("weight").size(0) / ROWS / target.multiprocessors
    if rounds < LEAST_SHARE:
        return []
    configs = [_config(tokens, stages, packed) for stages in STAGES]
    return [config for config in configs if fits(spec, config, target, gated)]


def unstaged_blocks(spec: OpSpec, config: Config) -> int:
    """Blocks of a tile that the stages do not hold at the start: what can be prefetched."""
    return spec.input("weight").size(1) // lossless.BLOCK - config["stages"]


def parameters(config: Config, gated: bool) -> list[str]:
    """The device function's template arguments."""
    flags = (str(flag).lower() for flag in (config["lossless"], gated))
    return [*(str(config[name]) for name in ("tokens", "stages", "prefetch")), *flags]


def launch(config: Config, call: Call, N: int) -> Launch:
    return Launch([N // ROWS, T.ceildiv(call.dims[Sym.TOKENS], config["tokens"])], THREADS, shared_bytes(config))


def _config(tokens: int, stages: int, packed: bool) -> Config:
    return {"kind": "fed", "tokens": tokens, "stages": stages, "prefetch": 0, "lossless": packed}
