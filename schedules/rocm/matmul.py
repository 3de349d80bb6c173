"""The matrix product of `linear` and `gate_up_silu` for few tokens on the matrix cores: y[T, N] = x[T, K] @ w[N, K].T.

A thread block has some tiles of rows and of tokens (product.py); weights are read once.

Roofline.  N * K * 2 bytes of weights (1.5 if lossless), 2 * T * N * K operations: up to some hundred tokens the bound
is memory.  Gates and ups of Llama-3.1-8B (28672 x 4096): 235 MB, 44 us at an MI300X's 5.3 TB/s; lossless 176 MB, 33 us.
A compute unit's share of that at a microsecond of latency is 17 KiB under way.  A wave's four steps are 8 KiB of plain
weights: the down projection (4096 x 14336) has 3.4 waves a compute unit, 27 KiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile import lossless
from vllm_compile.spec import OpSpec, TensorSpec
from vllm_compile.targets.rocm import RocmTarget

from ..arguments import bind_arguments
from ..family import Config, Variant
from .build import Resources
from .estimate import seconds_of
from .footprint import Footprint
from .norm import ALIGN, VECTOR
from .product import Product, Shape, finish
from .weights import BLOCK, OWN, SIDE_ROUNDS, TILE, UNPACKED, Packed, Plain, SideList, as_float32, bits
from .weights import REGISTERS as WEIGHT_REGISTERS

ROWS = 4  # that a lane writes: a weight has a multiple of them
WAVES = (4, 3, 2, 1)  # of a thread block: as many as share the blocks of a row evenly
STEPS = (4, 2, 1)  # blocks whose loads are under way together
REGISTERS = 96  # that the loads of those blocks may take
ROW_TILES, ALL_STEPS, ALL_REGISTERS = (1, 2, 4), (8, *STEPS), 256  # what tuning may try
# Least and most tokens of a variant, plain or lossless.  Beyond, hipBLASLt's tiles are worth their larger blocks; four
# tiles of tokens and the codes of lossless weights leave a SIMD two waves.
BUCKETS = {False: {1: 16, 17: 32, 33: 64}, True: {1: 16, 17: 32}}
USUAL_REGISTERS = 128  # of a kernel that is not built yet


def serves(spec: OpSpec, gated: bool, packed: bool) -> bool:
    """True for bf16 weights of whole blocks and of 4 * n rows; lossless ones, and gates and ups, of pairs of tiles."""
    weight = spec.input("weight")
    whole = weight.size(0) % (2 * TILE if gated or packed else ROWS) == 0 and weight.size(1) % BLOCK == 0
    return spec.input("x").dtype == weight.dtype == "bfloat16" and whole


def pays(spec: OpSpec, target: RocmTarget, gated: bool) -> bool:
    """True if the model of the chip (estimate.py) has a decode step of one token faster with lossless weights."""
    plain, packed = (_usual_seconds(spec, target, gated, packed) for packed in (False, True))
    return packed < plain


def _usual_seconds(spec: OpSpec, target: RocmTarget, gated: bool, packed: bool) -> float:
    config = variants(spec, target, gated, packed)[0].config
    shape = Shape.of(config, gated, packed)
    resources = Resources((), USUAL_REGISTERS, 0, 0, 4 * shape.lds_floats, shape.threads)
    return seconds_of(footprint(spec, config, 1, gated, packed), resources, target)


def variants(spec: OpSpec, target: RocmTarget, gated: bool, packed: bool) -> Sequence[Variant]:
    """By arithmetic, not measured: two tiles of rows a block where that leaves blocks enough for all compute units."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    halves = 2 if gated else 1
    tiles = -(-N // TILE) // halves
    rows = 2 if not gated and tiles % 2 == 0 and (packed or tiles // 2 >= 2 * target.compute_units) else 1
    waves = next(waves for waves in WAVES if K // BLOCK % waves == 0)
    found = []
    for least, most in BUCKETS[packed].items():
        tokens = most // TILE
        loaded = rows * halves * WEIGHT_REGISTERS[packed] + tokens * OWN // 2  # registers of a step
        steps = next(s for s in STEPS if K // BLOCK % (waves * s) == 0 and (s * loaded <= REGISTERS or s == 1))
        found.append(Variant(least, {"row_tiles": rows, "token_tiles": tokens, "waves": waves, "steps": steps}))
    return found


def space(spec: OpSpec, target: RocmTarget, gated: bool, packed: bool) -> Sequence[Config]:
    tiles = [most // TILE for most in BUCKETS[packed].values()]
    return configurations(spec.input("weight").size(0), spec.input("weight").size(1), tiles, target, gated, packed)


def configurations(
    N: int, K: int, token_tiles: Iterable[int], target: RocmTarget, gated: bool, packed: bool
) -> Sequence[Config]:
    """All that fits LDS and, by arithmetic, registers; which of them spill their machine code tells."""
    found = []
    for rows, tokens, waves, steps in product(ROW_TILES, token_tiles, WAVES, ALL_STEPS):
        shape = Shape(rows, tokens, waves, steps, gated, packed)
        whole = -(-N // TILE) // (2 if gated else 1) % rows == 0 and K // BLOCK % (waves * steps) == 0
        loaded = steps * (shape.tiles * WEIGHT_REGISTERS[packed] + tokens * OWN // 2)
        fits = loaded <= ALL_REGISTERS and 4 * shape.lds_floats <= target.lds_bytes
        if whole and fits and not (packed and shape.tiles % 2):
            found.append({"row_tiles": rows, "token_tiles": tokens, "waves": waves, "steps": steps})
    return found


def vendor_tokens(packed: bool) -> int:
    """From so many tokens on a vendor's product takes over."""
    return max(BUCKETS[packed].values()) + 1


def admits(spec: OpSpec, config: Config, min_tokens: int, target: RocmTarget, gated: bool, packed: bool) -> bool:
    """True for what `space` lists for the tiles of tokens of that range."""
    most = BUCKETS[packed].get(min_tokens, 0)
    return config.get("token_tiles") == most // TILE and config in space(spec, target, gated, packed)


def footprint(spec: OpSpec, config: Config, tokens: int, gated: bool, packed: bool) -> Footprint:
    """Tokens that a tile lacks are read as its last: they cost what they would if they were there."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    shape = Shape.of(config, gated, packed)
    listed = -(-shape.tiles * TILE // shape.threads)  # turns of the side list's threads
    block = block_footprint(shape, K)
    return replace(
        block,
        bytes=sum(tensor.nbytes(tokens) for tensor in (*dict(spec.inputs).values(), *spec.outputs))
        - (2 * N * K - lossless.offsets(N, K)[2] if packed else 0),
        blocks=-(-N // TILE) // shape.tiles * -(-tokens // (TILE * shape.token_tiles)),
        rounds=block.rounds + (SIDE_ROUNDS * listed if packed else 0),
    )


def block_footprint(shape: Shape, K: int) -> Footprint:
    """Of one thread block alone, but for the side list's latency."""
    columns = K // BLOCK // shape.waves  # blocks of them that a wave takes
    loads = columns * (shape.tiles * WEIGHT_REGISTERS[shape.packed] + shape.token_tiles * OWN // 2) // (VECTOR // 2)
    restored = columns * shape.tiles * UNPACKED if shape.packed else 0
    weight = shape.tiles * TILE * K * (3 if shape.packed else 4) // 2
    written = shape.row_tiles * shape.token_tiles * TILE * TILE * 2
    moved = weight + shape.token_tiles * TILE * K * 2 + written
    return Footprint(
        bytes=moved,
        blocks=1,
        waves=shape.waves,
        rounds=columns // shape.steps,
        block_bytes=moved,
        mfmas=columns * shape.sums * OWN // 4,
        instructions=2 * loads + restored,  # and as many addresses
        lds_bytes=2 * 4 * shape.lds_floats,
    )


def matmul(spec: OpSpec, config: Config, gated: bool, packed: bool) -> tirx.PrimFunc:
    """The kernel of `spec`; any number of tokens, though made for those of its configuration."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    shape = Shape.of(config, gated, packed)
    height = N // 2 if gated else N
    stored = {"weight": TensorSpec((lossless.offsets(N, K)[2],), "uint8")} if packed else None

    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        tokens, tensors = bind_arguments(spec, stored, align=ALIGN)
        x = bits("x", tensors, tokens * K)
        if packed:
            weight = bits("weight", tensors, lossless.offsets(N, K)[2] // 4, "uint32")
        else:
            weight = bits("weight", tensors, N * K)
        columns = T.ceildiv(tokens, T.int64(TILE * shape.token_tiles))
        with (
            T.thread_binding(-(-height // TILE) // shape.row_tiles, thread="blockIdx.x") as group,
            T.thread_binding(columns, thread="blockIdx.y") as column,
            T.thread_binding(shape.threads, thread="threadIdx.x") as thread,
        ):
            product = Product(shape, K, thread)
            first_token = T.Bind(T.Cast("int64", column) * (TILE * shape.token_tiles))

            def first_row(tile: Any) -> Any:
                """Of a tile of the thread block: gates and ups alternate."""
                if gated:
                    return (group * shape.row_tiles + tile // 2) * TILE + tile % 2 * height
                return (group * shape.row_tiles + tile) * TILE

            def token_at(token: Any) -> Any:
                """Where a token of the thread block starts; what there is not is read as the last, and not stored."""
                return T.min(first_token + token, tokens - 1) * K

            rows = [first_row(tile) for tile in range(shape.tiles)]
            kind: Any = Packed if packed else Plain
            weights = kind.of(weight, N, K, product.place, rows, shape.steps)
            x_from = [T.Bind(token_at(m * TILE + product.place.at)) for m in range(shape.token_tiles)]
            side = None
            if packed:
                sizes = (shape.tiles * TILE, shape.token_tiles * TILE)
                side = SideList(weight, N, K, product.shared, shape.side_at, *sizes)
                side.prepare(
                    thread,
                    shape.threads,
                    lambda i: first_row(i // TILE) + i % TILE,
                    lambda token, k: as_float32(x[token_at(token) + k]),
                )
            product.accumulate(weights, x, x_from)

            def write(total: tirx.Buffer, row: Any, of_block: Any) -> None:
                token = T.Bind(first_token + of_block)
                n = T.Bind(group * shape.row_tiles * TILE + row)
                there = token < tokens
                with T.If(there if height % TILE == 0 else tirx.all(there, n < height)), T.Then():
                    finish(tensors, total, gated, token, n)

            product.write(weights, side, write)
    return builder.get()
