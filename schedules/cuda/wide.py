"""Configurations of `wide_linear` (wide_linear.cuh): weights streamed past wgmma, x shared by a thread block.

x is read once by each thread block, T * K * 2 bytes from L2 in all of K's parts together, against rows * K * 1.5 of
lossless weights.  At 64 tokens and 128 rows that is two thirds of the weights' bytes, at 256 rows a third: with weights
at 4.8 TB/s, 8.0 and 6.4 TB/s from the L2 cache, which gives some 5.5.  At 16 tokens 128 rows add a sixth.

The tensor cores: at 4.8 TB/s a multiprocessor gets 36 bytes a nanosecond, 14 lossless weights a cycle (10 plain); for
64 tokens 900 multiply-adds of the 2,048 that it can do.  Unpacking eight weights takes 13 instructions of a lane, 0.7
instructions of a warp a cycle, of 4.

In flight: 4.8 TB/s * 800 ns are 29 KB a multiprocessor; stages hold two or three times that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tvm.script import tirx as T

from vllm_compile import lossless
from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config
from .launch import Call, Launch

FUNCTION = "wide_linear"  # in the header of the same name
ROWS = 64  # of a warpgroup
TOKENS = (16, 32, 64)
MOST_GROUPS = 4  # warpgroups of a thread block
MOST_STAGES = 8
# (row_groups, k_groups, cluster): `default` takes the first that fills the chip; a search tries more.
SHAPES = ((4, 1, 1), (4, 1, 2), (2, 1, 1), (2, 1, 2), (2, 1, 4), (1, 2, 1), (1, 2, 2), (1, 2, 4))
MORE_SHAPES = ((1, 1, 2), (1, 1, 4), (2, 2, 1), (2, 2, 2), (2, 2, 4), (1, 4, 1), (1, 4, 2))


def shared_bytes(config: Config) -> int:
    """Shared memory of a thread block: buffers and stages of x, stages of weights; or in the same place the sums."""
    vectors = 3 if config["lossless"] else 4
    tokens, groups = config["tokens"], config["row_groups"] * config["k_groups"]
    x = config["k_groups"] * (2 + config["stages"]) * config["blocks"] * tokens * 128
    stages = 4 * groups * config["stages"] * config["blocks"] * vectors * 512
    return max(x + stages, config["k_groups"] * tokens * (config["row_groups"] * ROWS + 4) * 4)


def fits(spec: OpSpec, config: Config, target: CudaTarget, gated: bool) -> bool:
    """True if a kernel of this configuration can be built: whole warpgroups (half gates, half ups if gated)."""
    groups = config["row_groups"] * config["k_groups"]
    return (
        spec.input("weight").size(0) % (ROWS * config["row_groups"]) == 0
        and groups <= MOST_GROUPS
        and shared_bytes(config) <= target.shared_bytes
    )


def space(packed: bool) -> Sequence[Config]:
    """Every configuration there is."""
    return [
        _config(tokens, (row_groups, k_groups, cluster), blocks, stages, packed)
        for tokens in TOKENS
        for row_groups in (1, 2, 4)
        for k_groups in (1, 2, 4)
        for cluster in (1, 2, 4)
        for blocks in (1, 2)
        for stages in range(2, MOST_STAGES + 1)
    ]


def promising(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool, tokens: int) -> Sequence[Config]:
    """What is worth measuring for so many tokens: shapes that fill the chip, with as many stages as there is room."""
    found = []
    for shape in (*SHAPES, *MORE_SHAPES):
        rounds = _thread_blocks(spec, shape) / target.multiprocessors
        if not 0.7 <= rounds <= 12:
            continue
        for resident in (1, 2) if shape[0] * shape[1] == MOST_GROUPS or rounds <= 1 else (2, 3):
            found += [c for c in _roomiest(tokens, shape, packed, target, resident) if fits(spec, c, target, gated)]
    return found


def fills(spec: OpSpec, target: CudaTarget) -> bool:
    """True if thread blocks of 128 rows, each with all of K, keep at least nine in ten multiprocessors busy.

    Smaller weights take a split of K over a cluster, with which cuBLAS is faster for some: a search decides then.
    """
    return _thread_blocks(spec, (2, 1, 1)) >= 0.9 * target.multiprocessors


def default(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool, tokens: int) -> Config | None:
    """A choice by arithmetic, for up to `tokens` tokens; None if none fits, or where cuBLAS is faster.

    That is so of weights with few rows, and from 33 tokens on of those whose last round of thread blocks would be
    mostly empty (Qwen2.5-7B's gates and ups, whose 37,888 rows are 1.12 rounds: benchmarks/baseline.md).

    The largest thread blocks that keep the multiprocessors busy: at least four in five have one and all are resident,
    or the last round of several is not mostly empty.  Blocks of 256 rows, of which one is resident, only for 64 tokens,
    where the L2 cache limits, and no blocks of 64 rows; otherwise two are resident, so that one streams while the
    other starts or ends.
    """
    if not fills(spec, target):
        return None
    width = next(width for width in TOKENS if tokens <= width)
    chosen: Config | None = None
    for shape in SHAPES:
        if shape[2] > 1 or (shape[0] == 4 and width < 64) or (shape[0] == 1 and width == 64):
            continue
        resident = 1 if shape[0] == 4 else 2
        configs = [c for c in _roomiest(width, shape, packed, target, resident) if fits(spec, c, target, gated)]
        if not configs:
            continue
        # Two blocks of columns a step halve the barriers, if they leave room for three stages.
        chosen = next((c for c in configs if c["blocks"] == 2 and c["stages"] >= 3), configs[0])
        count, slots = _thread_blocks(spec, shape), resident * target.multiprocessors
        if 0.8 * target.multiprocessors <= count <= slots or count / (-(-count // slots) * slots) >= 0.7:
            return chosen
    return chosen if width < 64 else None


def roomy(spec: OpSpec, target: CudaTarget, gated: bool, tokens: int) -> Config | None:
    """Plain weights, of which there are several (experts): the largest thread blocks of whole K; None if none fits."""
    for shape in ((4, 1, 1), (2, 1, 1), (1, 1, 1)):
        configs = [*_roomiest(tokens, shape, False, target, 1 if shape[0] == 4 else 2)]
        for config in sorted(configs, key=lambda c: -c["blocks"] if c["stages"] >= 3 else 0):
            if fits(spec, config, target, gated):
                return config
    return None


def unstaged_blocks(spec: OpSpec, config: Config) -> int:
    """Blocks of a tile, in one part of K, that the stages do not hold at the start: what can be prefetched."""
    parts = config["k_groups"] * config["cluster"]
    return spec.input("weight").size(1) // lossless.BLOCK // parts - config["stages"] * config["blocks"]


def parameters(config: Config, gated: bool) -> list[str]:
    """The device function's template arguments."""
    names = ("tokens", "row_groups", "k_groups", "cluster", "blocks", "stages", "prefetch")
    flags = (str(flag).lower() for flag in (config["lossless"], gated))
    return [*(str(config[name]) for name in names), *flags]


def launch(config: Config, call: Call, N: int) -> Launch:
    grid = [
        N // (ROWS * config["row_groups"]) * config["cluster"],
        T.ceildiv(call.dims[Sym.TOKENS], config["tokens"]),
    ]
    threads = 128 * config["row_groups"] * config["k_groups"]
    return Launch(grid, threads, shared_bytes(config), config["cluster"])


def _config(tokens: int, shape: tuple[int, int, int], blocks: int, stages: int, packed: bool) -> Config:
    row_groups, k_groups, cluster = shape
    return {
        "kind": "wide",
        "tokens": tokens,
        "row_groups": row_groups,
        "k_groups": k_groups,
        "cluster": cluster,
        "blocks": blocks,
        "stages": stages,
        "prefetch": 0,
        "lossless": packed,
    }


def _roomiest(
    tokens: int, shape: tuple[int, int, int], packed: bool, target: CudaTarget, resident: int
) -> Iterator[Config]:
    """For one and for two blocks of columns a step, the most stages with which `resident` thread blocks have room."""
    room = target.shared_bytes_of(resident)
    for blocks in (1, 2):
        for stages in range(MOST_STAGES, 1, -1):
            config = _config(tokens, shape, blocks, stages, packed)
            if shared_bytes(config) <= room:
                yield config
                break


def _thread_blocks(spec: OpSpec, shape: tuple[int, int, int]) -> int:
    row_groups, _, cluster = shape
    return spec.input("weight").size(0) // (ROWS * row_groups) * cluster
