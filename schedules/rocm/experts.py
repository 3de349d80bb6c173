"""Linear layers of experts on the matrix cores: each row is multiplied by the weight of the expert that it goes to.

Rows of one expert are a group (`route` has sorted them), cut into tiles of 16, 32 or 64 from its end; a thread block
takes a tile and some rows of the expert's weight (product.py).  The grid is made of shapes: as many windows of
places in the sorted order as there can be tiles, each of one place if they are few; a block takes the tiles that start
in its window, one as a rule.

Of all weights only those of chosen experts are read: once where a group has no more rows than a tile, else once a tile,
from the cache that all compute units share.

Roofline.  With G groups (min(E, T * k) at most) G * N * K * 2 bytes of weights, 2 * T * k * N * K operations.
Mixtral-8x7B (k = 2, gates and ups 28672 x 4096): one token reads 470 MB, 89 us at an MI300X's 5.3 TB/s, of the 1.9 GB
that are there; 64 tokens read all, 354 us.  1,024 tokens are 481 GFLOP, 368 us at 1,307 TFLOP/s.  There a tile of 64
rows by 64 of the weight does 32 operations a byte that it loads; L2 gives a compute unit 54 bytes a clock, for 84 % of
the matrix cores' peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as build

from vllm_compile.spec import OpSpec
from vllm_compile.targets.rocm import RocmTarget

from ..arguments import bind_arguments
from ..family import Config, KernelFamily, Variant
from .footprint import Footprint
from .intrinsics import uniform
from .matmul import REGISTERS, STEPS, WAVES, block_footprint, configurations
from .norm import ALIGN
from .product import Product, Shape, finish
from .weights import BLOCK, OWN, TILE, Plain, bits
from .weights import REGISTERS as REGISTERS_OF

PLACE_ROUNDS = 2  # of loads: where groups end and whose they are; the tile's tokens
# Tiles of a group's rows: from so many rows on average on; then the most waves, and tiles of rows of the weight (gates
# with ups count twice).  Few rows are bound by memory: waves share the columns.  Many by products: a wave has 64 x 64.
TILES = {1: (0, 4, 1), 2: (16, 4, 4), 4: (128, 1, 4)}


def expert_matmul(spec: OpSpec, config: Config, gated: bool) -> tirx.PrimFunc:
    """x [T, K] (of each token) or [T, k, K] (of each of its experts), w [E, N, K] -> [T, k, N]."""
    E, N, K = (spec.input("weight").size(axis) for axis in range(3))
    top_k = spec.input("experts").size(1)
    of_token = len(spec.input("x").shape) == 2
    shape = Shape.of(config, gated, packed=False)
    height = N // 2 if gated else N
    size = TILE * shape.token_tiles
    with IRBuilder() as builder, build.prim_func(s_tir=True):
        T.func_name("kernel")
        tokens, tensors = bind_arguments(spec, align=ALIGN)
        slots = T.Bind(tokens * top_k)
        x = bits("x", tensors, (tokens if of_token else slots) * K)
        weight = bits("weight", tensors, T.int64(E * N * K))
        experts, order, ends = (bits(name, tensors, slots, "int32") for name in ("experts", "order", "ends"))
        out = T.decl_buffer((slots, height), "bfloat16", data=tensors["out"].data, align=ALIGN)
        IRBuilder.name("out", out)
        # As many as there can be groups, and cuts of them; the host divides by them where there is no token, too.
        windows = T.min(slots, E + T.truncdiv(slots, T.int64(size)))
        window = T.Bind(T.max(T.ceildiv(slots, T.max(windows, T.int64(1))), T.int64(1)))
        with (
            T.thread_binding(T.ceildiv(slots, window), thread="blockIdx.x") as part,
            T.thread_binding(height // TILE // shape.row_tiles, thread="blockIdx.y") as group,
            T.thread_binding(shape.threads, thread="threadIdx.x") as thread,
        ):
            product = Product(shape, K, thread)
            next_tile = IRBuilder.name("next_tile", T.alloc_buffer((1,), "int32", scope="local"))
            first = T.Bind(T.Cast("int32", part * window))
            last = T.Bind(T.Cast("int32", T.min((part + 1) * window, slots)))

            def rows_from(place: Any, end: Any) -> Any:
                """Rows of the tile that `place` is in, from there on; its group ends at `end`."""
                return T.truncmod(end - place - 1, size) + 1

            end = T.Bind(ends[first])
            before = T.Bind(ends[T.max(first - 1, 0)])
            starts = tirx.any(first == 0, before == first, T.truncmod(end - first, size) == 0)
            T.buffer_store(next_tile, uniform(T.if_then_else(starts, first, first + rows_from(first, end))), [0])
            with (
                T.serial(T.min(T.Cast("int32", window), E + 1)),
                T.serial(T.if_then_else(next_tile[0] < last, 1, 0)),  # TVM has no barriers in a branch
            ):
                begin = T.Bind(uniform(next_tile[0]))
                rows = T.Bind(uniform(rows_from(begin, ends[begin])))
                expert = T.Bind(uniform(experts[order[begin]]))

                def slot_of(row: Any, begin: Any = begin, rows: Any = rows) -> Any:
                    """Of a row of the tile; what there is not is read as the last, and not stored."""
                    return T.Cast("int64", order[begin + T.min(row, rows - 1)])

                first_rows = []
                for tile in range(shape.tiles):
                    at = tile // 2 if gated else tile
                    half = tile % 2 * height if gated else 0
                    first_rows.append(expert * N + (group * shape.row_tiles + at) * TILE + half)
                weights = Plain.of(weight, E * N, K, product.place, first_rows, shape.steps)
                x_from = []
                for m in range(shape.token_tiles):
                    slot = slot_of(m * TILE + product.place.at)
                    x_from.append(T.Bind((T.truncdiv(slot, T.int64(top_k)) if of_token else slot) * K))
                product.accumulate(weights, x, x_from)

                def write(total: tirx.Buffer, row: Any, of_tile: Any, rows: Any = rows, slot_of: Any = slot_of) -> None:
                    with T.If(of_tile < rows), T.Then():
                        n = T.Bind(group * shape.row_tiles * TILE + row)
                        finish({"out": out}, total, gated, T.Bind(slot_of(of_tile)), n)

                product.write(weights, None, write)
                T.buffer_store(next_tile, begin + rows, [0])
    return builder.get()


def _windows(slots: int, E: int, shape: Shape) -> int:
    """Of so many places, as the kernel computes it."""
    if not slots:
        return 0
    tiles = min(slots, E + slots // (TILE * shape.token_tiles))
    return -(-slots // -(-slots // tiles))


class _ExpertFamily(KernelFamily):
    """Experts with bf16 weights [E, 16 * a, 64 * b], as PyTorch has them; gates and ups [E, 2 * 16 * a, 64 * b]."""

    gated: bool

    def serves(self, spec: OpSpec, target: RocmTarget) -> bool:
        weight = spec.input("weight")
        whole = weight.size(1) % (2 * TILE if self.gated else TILE) == 0 and weight.size(2) % BLOCK == 0
        return spec.input("x").dtype == weight.dtype == "bfloat16" and whole

    def variants(self, spec: OpSpec, target: RocmTarget) -> Sequence[Variant]:
        """By arithmetic, not measured: tiles for twice as many rows as a group has when routing is even."""
        E, N, K = (spec.input("weight").size(axis) for axis in range(3))
        halves = 2 if self.gated else 1
        found = {}
        for token_tiles, (rows, most_waves, tiles) in TILES.items():
            row_tiles = next(n for n in (tiles // halves or 1, 2, 1) if N // TILE // halves % n == 0)
            waves = next(n for n in WAVES if n <= most_waves and K // BLOCK % n == 0)
            loaded = row_tiles * halves * REGISTERS_OF[False] + token_tiles * OWN // 2  # registers of a step
            steps = next(n for n in STEPS if K // BLOCK % (waves * n) == 0 and (n * loaded <= REGISTERS or n == 1))
            config = {"row_tiles": row_tiles, "token_tiles": token_tiles, "waves": waves, "steps": steps}
            least = max(-(-rows * E // spec.input("experts").size(1)), 1)
            found[least] = Variant(least, config)
        return [found[least] for least in sorted(found)]

    def space(self, spec: OpSpec, target: RocmTarget) -> Sequence[Config]:
        N, K = spec.input("weight").size(1), spec.input("weight").size(2)
        return configurations(N, K, TILES, target, self.gated, packed=False)

    def admits(self, spec: OpSpec, config: Config, min_tokens: int, target: RocmTarget) -> bool:
        """True for what `space` lists for the tiles of that range."""
        of_range = {v.min_tokens: v.config["token_tiles"] for v in self.variants(spec, target)}
        return config.get("token_tiles") == of_range.get(min_tokens) and config in self.space(spec, target)

    def footprint(self, spec: OpSpec, config: Config, tokens: int, target: RocmTarget) -> Footprint:
        """Where routing is even; each block has a tile."""
        E, N, K = (spec.input("weight").size(axis) for axis in range(3))
        shape = Shape.of(config, self.gated, packed=False)
        top_k = spec.input("experts").size(1)
        slots, chosen = tokens * top_k, E * (1 - (1 - top_k / E) ** tokens)
        block = block_footprint(shape, K)
        whole = sum(tensor.nbytes(tokens) for tensor in (*dict(spec.inputs).values(), *spec.outputs))
        return replace(
            block,
            bytes=whole - round((E - chosen) * N * K * 2),
            blocks=_windows(slots, E, shape) * (N // TILE // shape.tiles),
            rounds=block.rounds + PLACE_ROUNDS,
        )

    def build(self, spec: OpSpec, config: Config, target: RocmTarget) -> tirx.PrimFunc:
        return expert_matmul(spec, config, self.gated)


@dataclass(frozen=True)
class ExpertLinear(_ExpertFamily):
    """`expert_linear`."""

    name: str = "rocm.expert_linear"
    op: str = "expert_linear"
    gated: bool = False


@dataclass(frozen=True)
class ExpertGateUpSilu(_ExpertFamily):
    """`expert_gate_up_silu`; a thread block has the gates and ups of its rows."""

    name: str = "rocm.expert_gate_up_silu"
    op: str = "expert_gate_up_silu"
    gated: bool = True
