"""The matrix product of `linear` and `gate_up_silu` for few tokens on the matrix cores: y[T, N] = x[T, K] @ w[N, K].T.

Weights are read once, straight from memory to the registers that the MFMA takes them from (weights.py): their rows are
the rows of the product, tokens its columns.  The sum over k may take k in any order, so a lane's neighbours of a row
are the k of several instructions.  The waves of a thread block take blocks of 64 columns in turn; their sums meet in
LDS.

Roofline.  N * K * 2 bytes of weights (1.5 if lossless), 2 * T * N * K operations: up to some hundred tokens the bound
is memory.  Gates and ups of Llama-3.1-8B (28672 x 4096): 235 MB, 44 us at an MI300X's 5.3 TB/s; lossless 176 MB, 33 us.
A compute unit's share of that at a microsecond of latency is 17 KiB under way.  A wave's four steps are 8 KiB of plain
weights: the down projection (4096 x 14336) has 3.4 waves a compute unit, 27 KiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile import lossless
from vllm_compile.spec import OpSpec, TensorSpec
from vllm_compile.targets.rocm import WAVE, RocmTarget

from ..arguments import bind_arguments
from ..family import Config, Variant
from ..rounding import rounded
from .build import Resources
from .elementwise import silu
from .estimate import seconds_of
from .footprint import Footprint
from .intrinsics import mfma, schedule_barrier, uniform
from .norm import ALIGN, VECTOR
from .weights import (
    BLOCK,
    OWN,
    RAISED,
    SIDE_ROUNDS,
    TILE,
    UNPACKED,
    Packed,
    Place,
    Plain,
    SideList,
    as_float32,
    bits,
    raised,
    store,
)
from .weights import REGISTERS as WEIGHT_REGISTERS

WAVES = (4, 3, 2, 1)  # of a thread block: as many as share the blocks of a row evenly
STEPS = (4, 2, 1)  # blocks whose loads are under way together
REGISTERS = 96  # that the loads of those blocks may take
ROW_TILES, ALL_STEPS, ALL_REGISTERS = (1, 2, 4), (8, *STEPS), 256  # what tuning may try
# Least and most tokens of a variant, plain or lossless.  Beyond, hipBLASLt's tiles are worth their larger blocks; four
# tiles of tokens and the codes of lossless weights leave a SIMD two waves.
BUCKETS = {False: {1: 16, 17: 32, 33: 64}, True: {1: 16, 17: 32}}
USUAL_REGISTERS = 128  # of a kernel that is not built yet


def serves(spec: OpSpec, gated: bool, packed: bool) -> bool:
    """True for bf16 weights of whole tiles and blocks; lossless ones, and gates and ups, in pairs of tiles."""
    weight = spec.input("weight")
    whole = weight.size(0) % (2 * TILE if gated or packed else TILE) == 0 and weight.size(1) % BLOCK == 0
    return spec.input("x").dtype == weight.dtype == "bfloat16" and whole


def pays(spec: OpSpec, target: RocmTarget, gated: bool) -> bool:
    """True if the model of the chip (estimate.py) has a decode step of one token faster with lossless weights."""
    plain, packed = (_usual_seconds(spec, target, gated, packed) for packed in (False, True))
    return packed < plain


def _usual_seconds(spec: OpSpec, target: RocmTarget, gated: bool, packed: bool) -> float:
    config = variants(spec, target, gated, packed)[0].config
    tiles = config["row_tiles"] * (2 if gated else 1)
    lds = _lds_bytes(tiles, config["token_tiles"], config["waves"], packed)
    resources = Resources((), USUAL_REGISTERS, 0, 0, lds, config["waves"] * WAVE)
    return seconds_of(footprint(spec, config, 1, gated, packed), resources, target)


def variants(spec: OpSpec, target: RocmTarget, gated: bool, packed: bool) -> Sequence[Variant]:
    """By arithmetic, not measured: two tiles of rows a block where that leaves blocks enough for all compute units."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    tiles, halves = N // TILE // (2 if gated else 1), 2 if gated else 1
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
    """All that fits LDS and, by arithmetic, registers; which of them spill their machine code tells."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    halves = 2 if gated else 1
    found = []
    for rows, most, waves, steps in product(ROW_TILES, BUCKETS[packed].values(), WAVES, ALL_STEPS):
        tokens, tiles = most // TILE, rows * halves
        whole = N // TILE // halves % rows == 0 and K // BLOCK % (waves * steps) == 0 and not (packed and tiles % 2)
        loaded = steps * (tiles * WEIGHT_REGISTERS[packed] + tokens * OWN // 2)
        if whole and loaded <= ALL_REGISTERS and _lds_bytes(tiles, tokens, waves, packed) <= target.lds_bytes:
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
    rows, token_tiles, waves, steps = (config[n] for n in ("row_tiles", "token_tiles", "waves", "steps"))
    tiles = 2 * rows if gated else rows
    columns = K // BLOCK // waves  # blocks of them that a wave takes
    loads = columns * (tiles * WEIGHT_REGISTERS[packed] + token_tiles * OWN // 2) // (VECTOR // 2)
    written = rows * token_tiles * TILE * TILE * 2
    weight = tiles * TILE * K * (3 if packed else 4) // 2
    restored = columns * (tiles * UNPACKED + token_tiles * RAISED) if packed else 0
    listed = -(-tiles * TILE // (waves * WAVE))  # turns of the side list's threads
    return Footprint(
        bytes=sum(tensor.nbytes(tokens) for tensor in (*dict(spec.inputs).values(), *spec.outputs))
        - (2 * N * K - lossless.offsets(N, K)[2] if packed else 0),
        blocks=N // TILE // tiles * -(-tokens // (TILE * token_tiles)),
        waves=waves,
        rounds=columns // steps + (SIDE_ROUNDS * listed if packed else 0),
        block_bytes=weight + token_tiles * TILE * K * 2 + written,
        mfmas=columns * tiles * token_tiles * OWN // 4,
        instructions=2 * loads + restored,  # and as many addresses
        lds_bytes=2 * _lds_bytes(tiles, token_tiles, waves, packed),
    )


def _lds_bytes(tiles: int, token_tiles: int, waves: int, packed: bool) -> int:
    """Of the waves' sums, tiles of float32; what is one wave's only sum stays in registers.  And of the side list."""
    sums = waves * tiles * token_tiles
    listed = SideList.lds_floats(tiles * TILE, token_tiles * TILE) if packed else 0
    return 4 * (sums * TILE * TILE + listed) if sums > 1 or packed else 0


def matmul(spec: OpSpec, config: Config, gated: bool, packed: bool) -> tirx.PrimFunc:
    """The kernel of `spec`; any number of tokens, though made for those of its configuration."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    row_tiles, token_tiles, waves, steps = (config[n] for n in ("row_tiles", "token_tiles", "waves", "steps"))
    height = N // 2 if gated else N
    tiles = 2 * row_tiles if gated else row_tiles  # of weights
    sums = tiles * token_tiles
    threads = waves * WAVE
    listed = SideList.lds_floats(tiles * TILE, token_tiles * TILE) if packed else 0
    stored = {"weight": TensorSpec((lossless.offsets(N, K)[2],), "uint8")} if packed else None

    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        tokens, tensors = bind_arguments(spec, stored, align=ALIGN)
        x = bits("x", tensors, tokens * K)
        if packed:
            weight = bits("weight", tensors, lossless.offsets(N, K)[2] // 4, "uint32")
        else:
            weight = bits("weight", tensors, N * K)
        columns = T.ceildiv(tokens, T.int64(TILE * token_tiles))
        with (
            T.thread_binding(height // TILE // row_tiles, thread="blockIdx.x") as group,
            T.thread_binding(columns, thread="blockIdx.y") as column,
            T.thread_binding(threads, thread="threadIdx.x") as thread,
        ):
            acc = IRBuilder.name("acc", T.alloc_buffer((sums * 4,), "float32", scope="local"))
            b = IRBuilder.name("b", T.alloc_buffer((steps * token_tiles * OWN,), "uint16", scope="local"))
            total = IRBuilder.name("total", T.alloc_buffer((2 * 4,), "float32", scope="local"))
            side_at = waves * sums * WAVE * 4
            shared = IRBuilder.name("shared", T.alloc_buffer((side_at + listed,), "float32", scope="shared"))
            wave = T.Bind(uniform(thread // WAVE))
            place = Place(T.Bind(thread % TILE), T.Bind(thread % WAVE // TILE))
            first_token = T.Bind(T.Cast("int64", column) * (TILE * token_tiles))

            def first_row(tile: Any) -> Any:
                """Of a tile of the thread block: gates and ups alternate."""
                if gated:
                    return (group * row_tiles + tile // 2) * TILE + tile % 2 * height
                return (group * row_tiles + tile) * TILE

            def token_at(token: Any) -> Any:
                """Where a token of the thread block starts; what there is not is read as the last, and not stored."""
                return T.min(first_token + token, tokens - 1) * K

            rows = [first_row(tile) for tile in range(tiles)]
            kind: Any = Packed if packed else Plain
            weights = kind.of(weight, K, place, rows, steps)
            x_from = [T.Bind(token_at(m * TILE + place.at)) for m in range(token_tiles)]
            side = SideList(weight, N, K, shared, side_at, tiles * TILE, token_tiles * TILE)
            if packed:
                side.prepare(
                    thread,
                    threads,
                    lambda i: first_row(i // TILE) + i % TILE,
                    lambda token, k: as_float32(x[token_at(token) + k]),
                )
            for i in range(sums):
                store(acc, i * 4, T.broadcast(T.float32(0), 4), 4)

            def load(step: int, block: Any) -> None:
                weights.load(step, block)
                for m, start in enumerate(x_from):
                    for v in range(OWN // VECTOR):
                        values = x.vload([start + block * BLOCK + weights.column(v)], f"uint16x{VECTOR}")
                        store(b, (step * token_tiles + m) * OWN + v * VECTOR, values, VECTOR)

            def multiply(step: int) -> None:
                weights.unpack(step)
                for i in range(OWN // 4):
                    for m in range(token_tiles):
                        of_b = b.vload([(step * token_tiles + m) * OWN + i * 4], "uint16x4")
                        of_b = T.Bind(raised(of_b)) if packed else of_b
                        for tile in range(tiles):
                            to = (tile * token_tiles + m) * 4
                            product = mfma(weights.operand(step, tile, i), of_b, acc.vload([to], "float32x4"))
                            store(acc, to, product, 4)

            with T.serial(K // BLOCK // (waves * steps)) as turn:
                for step in range(steps):
                    load(step, (turn * steps + step) * waves + wave)
                schedule_barrier()
                for step in range(steps):
                    multiply(step)

            for i in range(sums):
                to = ((wave * sums + i) * WAVE + thread % WAVE) * 4
                store(shared, to, acc.vload([i * 4], "float32x4"), 4)

            def add_up(part: int, tile: Any, m: Any) -> None:
                """total[4 * part ...] = the waves' sums for four rows of a tile."""
                product, lane = weights.sum_of(tile)
                at = (product * token_tiles + m) * WAVE + lane
                terms = [shared.vload([(w * sums * WAVE + at) * 4], "float32x4") for w in range(waves)]
                store(total, part * 4, sum(terms[1:], terms[0]), 4)
                if packed:
                    for i in range(4):
                        row = tile * TILE + place.quarter * 4 + i
                        whole = side.complete(total[part * 4 + i], row, m * TILE + place.at)
                        T.buffer_store(total, whole, [part * 4 + i])

            pairs = row_tiles * token_tiles
            with T.serial(-(-pairs // waves)) as turn:
                pair = T.Bind(turn * waves + wave)
                tile, m = T.Bind(pair // token_tiles), T.Bind(pair % token_tiles)
                token = T.Bind(first_token + m * TILE + place.at)
                n = T.Bind((group * row_tiles + tile) * TILE + place.quarter * 4)
                with T.If(tirx.all(pair < pairs, token < tokens)), T.Then():
                    add_up(0, 2 * tile if gated else tile, m)
                    if gated:
                        add_up(1, 2 * tile + 1, m)
                    for i in range(4):
                        T.buffer_store(total, _finish(tensors, total, i, token, n + i, gated), [i])
                    with T.vectorized(4) as i:
                        T.buffer_store(tensors["out"], T.Cast("bfloat16", total[i]), [token, n + i])
    return builder.get()


def _finish(tensors: dict[str, tirx.Buffer], total: tirx.Buffer, i: Any, token: Any, n: Any, gated: bool) -> Any:
    """Bias in float32, rounding, residual; or the gate: as the references do."""
    y = total[i]
    if gated:
        return silu(rounded(y, "bfloat16")) * rounded(total[4 + i], "bfloat16")
    if "bias" in tensors:
        y = y + T.Cast("float32", tensors["bias"][n])
    if "residual" in tensors:
        y = T.Cast("float32", tensors["residual"][token, n]) + rounded(y, "bfloat16")
    return y
