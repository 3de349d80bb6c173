"""Configurations of `fed_linear` (fed_linear.cuh): two or four warpgroups that multiply, and warps that bring x.

Each multiplies 64 rows in a part of K.  Where the weight has rows for it, 256 rows and all of K for each thread block
keep x's share of what a multiprocessor reads low: 64 tokens are a third of the lossless weights' bytes.  With fewer
rows the parts of K, within a thread block, in a cluster, and split over the grid, give most multiprocessors their work.
Thread blocks of two warpgroups leave room for others.

Gates and ups of Llama-3.1-8B are 112 thread blocks of 256 rows, on 132 multiprocessors, each of which gets 29 bytes a
nanosecond at 64 tokens, 33 at 16, where all together could get 32 at 4.2 TB/s.  With 14 tiles of 16 rows instead of
16, two warps idle, they are 128.  Measured, that is no gain: lossless weights are 0.5 to 0.7 us a call slower so, as
the GPU draws all the power that it may either way.  Plain ones are 0.2 to 0.7 us faster up to 32 tokens, and have such
records (benchmarks/baseline.md).

Splits cost: each thread block leaves its sums in memory that the L2 cache holds (splits.cuh), and the last adds them
up.  64 tokens of 256 rows are 64 KB; with clusters of two, which halve them, and four splits the last reads 128 KB,
1.2 us of what a multiprocessor gets from L2.  So down of Llama-3.1-8B at 64 tokens is 3.8 us a call faster than
cuBLAS's, 8.5 faster than without splits (benchmarks/baseline.md).

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
TILE = 16  # rows of a warp
TOKENS = (8, 16, 32, 64)
STAGES = (2, 4)
GROUPS = ((4, 1), (2, 2), (1, 4), (2, 1), (1, 2))  # of rows and of parts of K, in a thread block
CLUSTERS = range(1, 9)  # of thread blocks; larger ones need a launch attribute of their own
SPLITS = range(2, 13)  # with clusters of one or two: larger ones are another way to the same
SPLIT_BYTES, SPLIT_GROUPS = 8 << 20, 1 << 14  # as in splits.cuh: sums of a launch, and those who add them up
RESERVED_BYTES = 1 << 10  # of shared memory, for each thread block
LEAST_SHARE = 0.45  # of the multiprocessors: so many thread blocks at least
DEFAULT_SHARE = 0.8  # of the places for thread blocks, one on each multiprocessor in each round, that have one
MOST_ROUNDS = 1.5  # of thread blocks that are part of a cluster, where multiprocessors have 4 warpgroups each
MOST_X = 32  # registers of x in a lane that brings it, tokens / row_groups; with two warpgroups there are more


def shared_bytes(config: Config) -> int:
    """Shared memory of a thread block: places of x, stages of weights, barriers; or in the same place the sums."""
    vectors = 3 if config["lossless"] else 4
    tokens, stages, row_groups, k_groups = (config[name] for name in ("tokens", "stages", "row_groups", "k_groups"))
    place, stage = tokens * 128, 4 * row_groups * vectors * 512
    sums = tokens * (TILE * tiles_of(config) + 4) * 4
    return k_groups * max(stages * (place + stage + 16), sums)


def fits(spec: OpSpec, config: Config, target: CudaTarget, gated: bool) -> bool:
    """True if a kernel of this configuration can be built: whole thread blocks, and rounds of all stages."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    rows, splits, cluster = TILE * tiles_of(config), splits_of(config), config["cluster"]
    round_columns = lossless.BLOCK * config["stages"] * config["k_groups"] * cluster
    whole = N % rows == 0 and K % round_columns == 0 and K // round_columns >= splits
    pairs = not gated or tiles_of(config) % 2 == 0
    sums = splits * N * cluster * -(-config["tokens"] // cluster) * 4
    held = splits == 1 or (sums <= SPLIT_BYTES and N // rows * cluster <= SPLIT_GROUPS)
    return whole and pairs and held and shared_bytes(config) <= target.shared_bytes


def space(packed: bool) -> Sequence[Config]:
    """Every configuration there is."""
    spread = [(cluster, 1) for cluster in CLUSTERS] + [(cluster, splits) for cluster in (1, 2) for splits in SPLITS]
    return [
        _config(tokens, row_groups, k_groups, cluster, stages, packed, splits, fewer)
        for tokens in TOKENS
        for row_groups, k_groups in GROUPS
        for cluster, splits in spread
        for stages in STAGES
        for fewer in (range(4) if cluster == splits == 1 else (0,))
        if tokens // row_groups <= MOST_X or row_groups * k_groups == 2
    ]


def takes(config: Config, tokens: int) -> bool:
    """Whether a kernel of this configuration can be called for so many tokens."""
    return splits_of(config) == 1 or tokens <= config["tokens"]


def tiles_of(config: Config) -> int:
    """Tiles of a thread block; a configuration that has one for each warp says nothing of them."""
    tiles: int = config.get("tiles", ROWS // TILE * config["row_groups"])
    return tiles


def splits_of(config: Config) -> int:
    """Parts of K over the grid; a configuration without says nothing of them."""
    splits: int = config.get("splits", 1)
    return splits


def promising(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool, tokens: int) -> Sequence[Config]:
    """What is worth measuring for so many tokens: thread blocks for half the multiprocessors, of parts of K one round.

    Of splits, and of fewer tiles than warps, those whose thread blocks all have a place at once, and fill four in five
    of the places.
    """
    found = []
    for config in space(packed):
        groups, parts = config["row_groups"] * config["k_groups"], config["cluster"] * splits_of(config)
        blocks = spec.input("weight").size(0) // (TILE * tiles_of(config)) * parts
        rounds = blocks * groups / 4 / target.multiprocessors
        filled = blocks >= LEAST_SHARE * target.multiprocessors and (parts == 1 or rounds <= MOST_ROUNDS)
        if splits_of(config) > 1 or "tiles" in config:
            resident = max(min(4 // groups, target.shared_bytes // (shared_bytes(config) + RESERVED_BYTES)), 1)
            filled = DEFAULT_SHARE <= blocks / resident / target.multiprocessors <= 1
        if filled and config["tokens"] == tokens and fits(spec, config, target, gated):
            found.append(config)
    return found


def default(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool, tokens: int) -> Config | None:
    """A choice by arithmetic, for up to `tokens` tokens; None unless large thread blocks fill rounds of one each.

    So lossless gates and ups were faster on an H200 than with the best wide kernel, lm_heads as fast within three
    hundredths (benchmarks/baseline.md).  Plain weights, with nothing to unpack, have it only where a record says so; an
    H100 was not measured.
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
    round_blocks = config["k_groups"] * config["cluster"] * config["stages"]
    rounds = spec.input("weight").size(1) // lossless.BLOCK // round_blocks // splits_of(config)
    return (rounds - 1) * config["stages"]


def parameters(config: Config, gated: bool) -> list[str]:
    """The device function's template arguments."""
    given = {**config, "splits": splits_of(config), "tiles": tiles_of(config)}
    names = ("tokens", "row_groups", "tiles", "k_groups", "cluster", "splits", "stages", "prefetch")
    flags = (str(flag).lower() for flag in (config["lossless"], gated))
    return [*(str(given[name]) for name in names), *flags]


def launch(config: Config, call: Call, N: int) -> Launch:
    tokens, splits = config["tokens"], splits_of(config)
    grid = [
        N // (TILE * tiles_of(config)) * config["cluster"] * splits,
        T.ceildiv(call.dims[Sym.TOKENS], tokens),
    ]
    threads = 160 * config["row_groups"] * config["k_groups"]  # four warps that multiply and one that brings x
    # More tokens would leave sums where others leave theirs.
    most = tokens if splits > 1 else None
    return Launch(grid, threads, shared_bytes(config), config["cluster"], most_tokens=most)


def _config(
    tokens: int,
    row_groups: int,
    k_groups: int,
    cluster: int,
    stages: int,
    packed: bool,
    splits: int = 1,
    fewer_tiles: int = 0,
) -> Config:
    return {
        "kind": "fed",
        "tokens": tokens,
        "row_groups": row_groups,
        "k_groups": k_groups,
        "cluster": cluster,
        "stages": stages,
        "prefetch": 0,
        "lossless": packed,
        **({"splits": splits} if splits > 1 else {}),
        **({"tiles": ROWS // TILE * row_groups - fewer_tiles} if fewer_tiles else {}),
    }
