"""Configurations of `stream_linear` (stream_linear.cuh): weights streamed past mma, x from L1 or L2.

x is read again by every thread block, T * K * 2 bytes, against 16 * row_tiles * K * 2 of weights: as many from 16
tokens on, which is where these kernels cease to be the right ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.script import tirx as T

from vllm_compile import lossless
from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config
from .launch import Call, Launch

FUNCTION = "stream_linear"  # in the header of the same name
TOKENS = 8  # of one mma
MOST_SUMS = 64  # tiles of sums of a thread block's warps that its registers hold without spilling


def shared_bytes(config: Config) -> int:
    """Shared memory of a thread block: the stages of all warps, or in the same place their sums."""
    vectors = 3 if config["lossless"] else 4
    return 512 * config["warps"] * config["row_tiles"] * max(config["stages"] * vectors, config["token_tiles"])


def fits(spec: OpSpec, config: Config, target: CudaTarget, gated: bool) -> bool:
    """True if a kernel of this configuration can be built."""
    N = spec.input("weight").size(0)
    halves = 2 if gated else 1
    return (
        N % (lossless.TILE * max(config["row_tiles"], halves)) == 0
        and config["row_tiles"] % halves == 0
        and config["warps"] * config["token_tiles"] * config["row_tiles"] <= MOST_SUMS
        and shared_bytes(config) <= target.shared_bytes
    )


def space(packed: bool) -> Sequence[Config]:
    """Every configuration there is."""
    return [
        {
            "kind": "stream",
            "token_tiles": m,
            "row_tiles": r,
            "warps": warps,
            "stages": stages,
            "prefetch": 0,
            "ahead": ahead,
            "lossless": packed,
        }
        for m in (1, 2, 4, 8)
        for r in (1, 2, 4)
        for warps in (4, 8, 16)
        for stages in (2, 3, 4, 6)
        for ahead in (False, True)
    ]


def promising(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool, tokens: int) -> Sequence[Config]:
    """What is worth measuring for so many tokens: two stages leave L1 to x, three get over uneven memory."""
    rows = 2 if gated else 1
    return [
        config
        for config in space(packed)
        if config["token_tiles"] * TOKENS == max(tokens, TOKENS)
        and config["row_tiles"] in (rows, 2 * rows)
        and config["warps"] > 4
        and config["stages"] < 4
        and not (config["ahead"] and tokens > TOKENS)
        and fits(spec, config, target, gated)
    ]


def default(spec: OpSpec, target: CudaTarget, packed: bool, gated: bool, tokens: int) -> Config | None:
    """What was fastest for up to `tokens` tokens on an H200 (benchmarks/baseline.md); None if none fits.

    Many warps to a tile of rows where a multiprocessor has no more than two tiles.  Two stages, which leave most of the
    memory to L1 and so to x.  x ahead for up to eight tokens, save for gated weights and where a multiprocessor has
    three tiles.
    """
    row_tiles = 2 if gated else 1
    shares = spec.input("weight").size(0) / (lossless.TILE * row_tiles) / target.multiprocessors
    config = {
        "kind": "stream",
        "token_tiles": -(-tokens // TOKENS),
        "row_tiles": row_tiles,
        "warps": 16 if shares <= 2 or not (packed or gated) else 8,
        "stages": 2 if packed or not gated else 3,
        "prefetch": 0,
        "ahead": tokens <= TOKENS and not (gated or 2 < shares <= 3),
        "lossless": packed,
    }
    return config if fits(spec, config, target, gated) else None


def unstaged_blocks(spec: OpSpec, config: Config) -> int:
    """Blocks of a tile that the stages do not hold at the start: what can be prefetched."""
    return spec.input("weight").size(1) // lossless.BLOCK - config["stages"] * config["warps"]


def parameters(config: Config, gated: bool) -> list[str]:
    """The device function's template arguments."""
    flags = (str(flag).lower() for flag in (config["ahead"], config["lossless"], gated))
    numbers = (config[name] for name in ("token_tiles", "row_tiles", "warps", "stages", "prefetch"))
    return [*map(str, numbers), *flags]


def launch(config: Config, call: Call, N: int) -> Launch:
    grid = [
        N // (lossless.TILE * config["row_tiles"]),
        T.ceildiv(call.dims[Sym.TOKENS], TOKENS * config["token_tiles"]),
    ]
    return Launch(grid, 32 * config["warps"], shared_bytes(config))
