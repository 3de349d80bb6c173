"""Configurations of `fed_linear` (fed_linear.cuh): two or four warpgroups that multiply, and warps that bring x.

Each multiplies 64 rows in a part of K.  Where the weight has rows for it, 256 rows and all of K for each thread block
keep x's share of what a multiprocessor reads low: 64 tokens are a third of the lossless weights' bytes.  With fewer
rows the parts of K, within a thread block and in a cluster, give most multiprocessors their work.  Thread blocks of
two warpgroups leave room for others.

At 4.8 TB/s a multiprocessor gets a block of 256 x 64 lossless weights every 680 ns, 1,200 cycles.  Of these the
tensor cores take 512 for 64 tokens; each scheduler has 4 warps that unpack, 110 instructions each (the machine code's
loop, without the branch for the side list), and one that brings x.  In a wide kernel it is 170 instructions, and all
warps wait for each other once a step.  A GPU at its power limit pays for instructions with its clock, so that the
difference counts from 9 tokens on (benchmarks/baseline.md).

In flight: each stage of four warpgroups holds 24 KB of lossless weights, of the 29 KB a multiprocessor that 4.8 TB/s *
800 ns are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tvm.script import tirx as T

from vllm_compile import lossless
from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config
from .launch import Call, Launch

FUNCTION = "fed_linear"  # in the header of the same name
ROWS = 64  # of a warpgroup
TOKENS = (8, 16, 32, 64)
STAGES = (2, 4)
GROUPS = ((4, 1), (2, 2), (1, 4), (2, 1), (1, 2))  # of rows and of parts of K, in a thread block
CLUSTERS = range(1, 9)  # of thread blocks; larger ones need a launch attribute of their own
LEAST_SHARE = 0.45  # of the multiprocessors: so many thread blocks at least
DEFAULT_SHARE = 0.8  # of the places for thread blocks, one on each multiprocessor in each round, that have one
MOST_ROUNDS = 1.5  # of thread blocks that are part of a cluster, where multiprocessors have 4 warpgroups each
MOST_X = 32  # registers of x in a lane that brings it, tokens / row_groups; with two warpgroups there are more


def shared_bytes(config: Config) -> int:
    """Shared memory of a thread block: places of x, stages of weights, barriers; or in the same place the sums."""
    vectors = 3 if config["lossless"] else 4
    tokens, stages, row_groups, k_groups = (config[name] for name in ("tokens", "stages", "row_groups", "k_groups"))
    place, stage = tokens * 128, 4 * row_groups * vectors * 512
    sums = tokens * (ROWS * row_groups + 4) * 4
    return k_groups * max(stages * (place + stage + 16), sums)


def fits(spec: OpSpec, config: Config, target: CudaTarget, gated: bool) -> bool:
    """True if a kernel of this configuration can be built: whole thread blocks, and rounds of all stages."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    round_columns = lossless.BLOCK * config["stages"] * config["k_groups"] * config["cluster"]
    whole = N % (ROWS * config["row_groups"]) == 0 and K % round_columns == 0
    return whole and shared_bytes(config) <= target.shared_bytes


def space(packed: bool) -> Sequence[Config]:
    """Every configuration there is."""
    return [
        _config(tokens, row_groups, k_groups, cluster, stages, packed)
        for tokens in TOKENS
        for row_groups, k_groups in GROUPS
        for cluster in CLUSTERS
        for stages in STAGES
        if tokens // row_groups <= MOST_X or row_groups * k_groups == 2
    ]


def promising(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool, tokens: int) -> Sequence[Config]:
    """What is worth measuring for so many tokens: thread blocks for half the multiprocessors, of clusters one round."""
    found = []
    for config in space(packed):
        groups = config["row_groups"] * config["k_groups"]
        blocks = spec.input("weight").size(0) // (ROWS * config["row_groups"]) * config["cluster"]
        rounds = blocks * groups / 4 / target.multiprocessors
        filled = blocks >= LEAST_SHARE * target.multiprocessors and (config["cluster"] == 1 or rounds <= MOST_ROUNDS)
        if filled and config["tokens"] == tokens and fits(spec, config, target, gated):
            found.append(config)
    return found


def default(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool, tokens: int) -> Config | None:
    """A choice by arithmetic, for up to `tokens` tokens; None unless large thread blocks fill rounds of one each.

    So lossless gates and ups were faster on an H200 than with the best wide kernel, lm_heads as fast within three
    hundredths (benchmarks/baseline.md).  Plain weights, with nothing to unpack, and an H100 were not measured.
    """
    if not packed:
        return None
    width = next(width for width in TOKENS if tokens <= width)
    for stages in reversed(STAGES):
        config = _config(width, *GROUPS[0], 1, stages, packed)
        if fits(spec, config, target, gated):
            rounds = spec.input("weight").size(0) / (ROWS * config["row_groups"]) / target.multiprocessors
            return config if rounds / math.ceil(rounds) >= DEFAULT_SHARE else None
    return None


def unstaged_blocks(spec: OpSpec, config: Config) -> int:
    """Blocks of a tile, in one part of K, that the stages do not hold at the start: what can be prefetched."""
    parts = config["k_groups"] * config["cluster"]
    return spec.input("weight").size(1) // lossless.BLOCK // parts - config["stages"]


def parameters(config: Config, gated: bool) -> list[str]:
    """The device function's template arguments."""
    names = ("tokens", "row_groups", "k_groups", "cluster", "stages", "prefetch")
    flags = (str(flag).lower() for flag in (config["lossless"], gated))
    return [*(str(config[name]) for name in names), *flags]


def launch(config: Config, call: Call, N: int) -> Launch:
    grid = [
        N // (ROWS * config["row_groups"]) * config["cluster"],
        T.ceildiv(call.dims[Sym.TOKENS], config["tokens"]),
    ]
    threads = 160 * config["row_groups"] * config["k_groups"]  # four warps that multiply and one that brings x
    return Launch(grid, threads, shared_bytes(config), config["cluster"])


def _config(tokens: int, row_groups: int, k_groups: int, cluster: int, stages: int, packed: bool) -> Config:
    return {
        "kind": "fed",
        "tokens": tokens,
        "row_groups": row_groups,
        "k_groups": k_groups,
        "cluster": cluster,
        "stages": stages,
        "prefetch": 0,
        "lossless": packed,
    }
