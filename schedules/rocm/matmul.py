"""The matrix product of `linear` and `gate_up_silu` for few tokens on the matrix cores: y[T, N] = x[T, K] @ w[N, K].T.

Weights are read once, 32 bytes a lane and step, straight from memory to the registers that the MFMA takes them from:
their rows are the rows of the product, tokens its columns.  The sum over k may take k in any order, so a lane's 16
neighbours of a row are the k of four instructions.  The waves of a thread block take blocks of 64 columns in turn;
their sums meet in LDS.

Roofline.  N * K * 2 bytes of weights, 2 * T * N * K operations: up to some hundred tokens the bound is memory.  Gates
and ups of Llama-3.1-8B (28672 x 4096): 235 MB, 44 us at an MI300X's 5.3 TB/s.  A compute unit's share of that at a
microsecond of latency is 17 KiB under way.  A wave's four steps are 8 KiB of weights: the down projection
(4096 x 14336) has 3.4 waves a compute unit, 27 KiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import OpSpec
from vllm_compile.targets.rocm import WAVE, RocmTarget

from ..arguments import bind_arguments
from ..family import Config, Variant
from ..rounding import rounded
from .elementwise import silu
from .footprint import Footprint
from .intrinsics import mfma, schedule_barrier, uniform
from .norm import ALIGN, VECTOR

TILE = 16  # rows, and tokens, of an MFMA
BLOCK = 64  # columns that a wave takes at a time
WAVES = (4, 3, 2, 1)  # of a thread block: as many as share the blocks of a row evenly
OWN = BLOCK // 4  # of a lane, of each row or token of its
STEPS = (4, 2, 1)  # blocks whose loads are under way together
REGISTERS = 96  # that the loads of those blocks may take
ROW_TILES, ALL_STEPS, ALL_REGISTERS = (1, 2, 4), (8, *STEPS), 256  # what tuning may try
BUCKETS = {1: 16, 17: 32, 33: 64}  # least and most tokens of a variant
VENDOR_TOKENS = 65  # beyond, hipBLASLt's tiles are worth their larger blocks


def serves(spec: OpSpec, gated: bool) -> bool:
    """True for bf16 weights of whole tiles and blocks; of a gated product, each half in whole tiles."""
    weight = spec.input("weight")
    rows = weight.size(0) // 2 if gated else weight.size(0)
    whole = rows % TILE == 0 and weight.size(1) % BLOCK == 0
    return spec.input("x").dtype == weight.dtype == "bfloat16" and whole


def variants(spec: OpSpec, target: RocmTarget, gated: bool) -> Sequence[Variant]:
    """By arithmetic, not measured: two tiles of rows a block where that leaves blocks enough for all compute units."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    tiles, halves = N // TILE // (2 if gated else 1), 2 if gated else 1
    rows = 2 if not gated and tiles % 2 == 0 and tiles // 2 >= 2 * target.compute_units else 1
    waves = next(waves for waves in WAVES if K // BLOCK % waves == 0)
    found = []
    for least, most in BUCKETS.items():
        tokens = most // TILE
        loaded = (rows * halves + tokens) * OWN // 2  # registers of a step
        steps = next(s for s in STEPS if K // BLOCK % (waves * s) == 0 and (s * loaded <= REGISTERS or s == 1))
        found.append(Variant(least, {"row_tiles": rows, "token_tiles": tokens, "waves": waves, "steps": steps}))
    return found


def space(spec: OpSpec, target: RocmTarget, gated: bool) -> Sequence[Config]:
    """All that fits LDS and, by arithmetic, registers; which of them spill their machine code tells."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    halves = 2 if gated else 1
    found = []
    for rows, most, waves, steps in product(ROW_TILES, BUCKETS.values(), WAVES, ALL_STEPS):
        tokens = most // TILE
        whole = N // TILE // halves % rows == 0 and K // BLOCK % (waves * steps) == 0
        loaded = steps * (rows * halves + tokens) * OWN // 2
        if whole and loaded <= ALL_REGISTERS and _lds_bytes(rows * halves * tokens, waves) <= target.lds_bytes:
            found.append({"row_tiles": rows, "token_tiles": tokens, "waves": waves, "steps": steps})
    return found


def admits(spec: OpSpec, config: Config, min_tokens: int, target: RocmTarget, gated: bool) -> bool:
    """True for what `space` lists for the tiles of tokens of that range."""
    fits = min_tokens in BUCKETS and config.get("token_tiles") == BUCKETS[min_tokens] // TILE
    return fits and config in space(spec, target, gated)


def footprint(spec: OpSpec, config: Config, tokens: int, gated: bool) -> Footprint:
    """Tokens that a tile lacks are read as its last: they cost what they would if they were there."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    rows, token_tiles, waves, steps = (config[n] for n in ("row_tiles", "token_tiles", "waves", "steps"))
    tiles = 2 * rows if gated else rows
    columns = K // BLOCK // waves  # blocks of them that a wave takes
    loads = columns * (tiles + token_tiles) * OWN // VECTOR
    written = rows * token_tiles * TILE * TILE * 2
    return Footprint(
        bytes=sum(tensor.nbytes(tokens) for tensor in (*dict(spec.inputs).values(), *spec.outputs)),
        blocks=N // TILE // tiles * -(-tokens // (TILE * token_tiles)),
        waves=waves,
        rounds=columns // steps,
        block_bytes=(tiles + token_tiles) * TILE * K * 2 + written,
        mfmas=columns * tiles * token_tiles * OWN // 4,
        instructions=2 * loads,  # and as many addresses
        lds_bytes=2 * _lds_bytes(tiles * token_tiles, waves),
    )


def _lds_bytes(sums: int, waves: int) -> int:
    """Of the waves' sums, tiles of float32; what is one wave's only sum stays in registers."""
    return waves * sums * TILE * TILE * 4 if waves * sums > 1 else 0


def matmul(spec: OpSpec, config: Config, gated: bool) -> tirx.PrimFunc:
    """The kernel of `spec`; any number of tokens, though made for those of its configuration."""
    N, K = spec.input("weight").size(0), spec.input("weight").size(1)
    row_tiles, token_tiles, waves, steps = (config[n] for n in ("row_tiles", "token_tiles", "waves", "steps"))
    height = N // 2 if gated else N
    tiles = 2 * row_tiles if gated else row_tiles  # of weights: those of gates, then those of ups
    sums = tiles * token_tiles
    threads = waves * WAVE

    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        tokens, tensors = bind_arguments(spec, align=ALIGN)
        x = _bits("x", tensors, tokens * K)
        weight = _bits("weight", tensors, N * K)
        columns = T.ceildiv(tokens, T.int64(TILE * token_tiles))
        with (
            T.thread_binding(height // TILE // row_tiles, thread="blockIdx.x") as group,
            T.thread_binding(columns, thread="blockIdx.y") as column,
            T.thread_binding(threads, thread="threadIdx.x") as thread,
        ):
            acc = IRBuilder.name("acc", T.alloc_buffer((sums * 4,), "float32", scope="local"))
            a = IRBuilder.name("a", T.alloc_buffer((steps * tiles * OWN,), "uint16", scope="local"))
            b = IRBuilder.name("b", T.alloc_buffer((steps * token_tiles * OWN,), "uint16", scope="local"))
            total = IRBuilder.name("total", T.alloc_buffer((2 * 4,), "float32", scope="local"))
            shared = IRBuilder.name("shared", T.alloc_buffer((waves * sums * WAVE * 4,), "float32", scope="shared"))
            wave = T.Bind(uniform(thread // WAVE))
            at = T.Bind(thread % TILE)  # the lane's row, and token, of a tile
            quarter = T.Bind(thread % WAVE // TILE)  # of the columns of a block
            first_token = T.Bind(T.Cast("int64", column) * (TILE * token_tiles))

            def rows_at(tile: int) -> Any:
                """Where the lane's row of a tile starts."""
                row = (group * row_tiles + tile % row_tiles) * TILE + tile // row_tiles * height + at
                return T.Bind(T.Cast("int64", row) * K + quarter * OWN)

            def tokens_at(tile: int) -> Any:
                """Where the lane's token of a tile starts; what there is not is read as the last, and not stored."""
                return T.Bind(T.min(first_token + tile * TILE + at, tokens - 1) * K + quarter * OWN)

            w_from = [rows_at(tile) for tile in range(tiles)]
            x_from = [tokens_at(tile) for tile in range(token_tiles)]
            for i in range(sums):
                _store(acc, i * 4, T.broadcast(T.float32(0), 4), 4)

            def load(step: int, block: Any) -> None:
                for to, source, starts in ((a, weight, w_from), (b, x, x_from)):
                    for tile, start in enumerate(starts):
                        for v in range(OWN // VECTOR):
                            values = source.vload([start + block * BLOCK + v * VECTOR], f"uint16x{VECTOR}")
                            _store(to, (step * len(starts) + tile) * OWN + v * VECTOR, values, VECTOR)

            def multiply(step: int) -> None:
                for i in range(OWN // 4):
                    for tile in range(tiles):
                        for m in range(token_tiles):
                            of_a = a.vload([(step * tiles + tile) * OWN + i * 4], "uint16x4")
                            of_b = b.vload([(step * token_tiles + m) * OWN + i * 4], "uint16x4")
                            to = (tile * token_tiles + m) * 4
                            _store(acc, to, mfma(of_a, of_b, acc.vload([to], "float32x4")), 4)

            with T.serial(K // BLOCK // (waves * steps)) as turn:
                for step in range(steps):
                    load(step, (turn * steps + step) * waves + wave)
                schedule_barrier()
                for step in range(steps):
                    multiply(step)

            for i in range(sums):
                to = ((wave * sums + i) * WAVE + thread % WAVE) * 4
                _store(shared, to, acc.vload([i * 4], "float32x4"), 4)

            def add_up(part: int, pair: Any) -> None:
                """total[4 * part ...] = the waves' sums for a pair of tiles."""
                terms = [
                    shared.vload([((w * sums + pair) * WAVE + thread % WAVE) * 4], "float32x4") for w in range(waves)
                ]
                _store(total, part * 4, sum(terms[1:], terms[0]), 4)

            pairs = row_tiles * token_tiles
            with T.serial(-(-pairs // waves)) as turn:
                pair = T.Bind(turn * waves + wave)
                token = T.Bind(first_token + pair % token_tiles * TILE + at)
                n = T.Bind((group * row_tiles + pair // token_tiles) * TILE + quarter * 4)
                with T.If(tirx.all(pair < pairs, token < tokens)), T.Then():
                    add_up(0, pair)
                    if gated:
                        add_up(1, pairs + pair)
                    for i in range(4):
                        T.buffer_store(total, _finish(tensors, total, i, token, n + i, gated), [i])
                    with T.vectorized(4) as i:
                        T.buffer_store(tensors["out"], T.Cast("bfloat16", total[i]), [token, n + i])
    return builder.get()


def _bits(name: str, tensors: dict[str, tirx.Buffer], size: Any) -> tirx.Buffer:
    """A bf16 tensor as what the matrix cores take, in one dimension."""
    return IRBuilder.name(name, T.decl_buffer((size,), "uint16", data=tensors[name].data, align=ALIGN))


def _store(buffer: Any, start: Any, value: Any, lanes: int) -> None:
    T.buffer_store(buffer, value, [T.ramp(start, 1, lanes)])


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
