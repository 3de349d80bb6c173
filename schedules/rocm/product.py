"""Products of rows of a weight with a few tokens on the matrix cores: a thread block of matmul.py or experts.py.

Weights go straight from memory to the registers that the MFMA takes them from (weights.py): their rows are the rows of
the product, tokens its columns.  The sum over k may take k in any order, so a lane's neighbours of a row are the k of
several instructions.  The waves of a thread block take blocks of 64 columns in turn; their sums meet in LDS.  A wave on
its own keeps them in its registers, plain weights': each lane has the sums that it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from vllm_compile.targets.rocm import WAVE

from ..family import Config
from ..rounding import rounded
from .elementwise import silu
from .intrinsics import mfma, schedule_barrier, uniform
from .norm import VECTOR
from .weights import BLOCK, OWN, TILE, Packed, Place, Plain, SideList, store

# total, of which the first four are sums of rows `row` to `row + 3` of a tile (gated: four more, of ups); row, token.
Write = Callable[[tirx.Buffer, Any, Any], None]


@dataclass(frozen=True)
class Shape:
    """What a thread block computes: `row_tiles` tiles of rows (each of gates and of ups) by `token_tiles` of tokens.

    Attributes:
        waves: that share the columns.
        steps: blocks of columns whose loads are under way together.
    """

    row_tiles: int
    token_tiles: int
    waves: int
    steps: int
    gated: bool
    packed: bool

    @staticmethod
    def of(config: Config, gated: bool, packed: bool) -> Shape:
        row_tiles, token_tiles, waves, steps = (config[n] for n in ("row_tiles", "token_tiles", "waves", "steps"))
        return Shape(row_tiles, token_tiles, waves, steps, gated, packed)

    @property
    def tiles(self) -> int:
        """Of weights."""
        return 2 * self.row_tiles if self.gated else self.row_tiles

    @property
    def sums(self) -> int:
        """Tiles of sums of a wave."""
        return self.tiles * self.token_tiles

    @property
    def threads(self) -> int:
        return self.waves * WAVE

    @property
    def side_at(self) -> int:
        """Where the side list starts in LDS, behind the waves' sums; floats."""
        return self.waves * self.sums * TILE * TILE if self.waves > 1 or self.packed else 0

    @property
    def lds_floats(self) -> int:
        """The waves' sums, but for those of one wave; and the side list."""
        listed = SideList.lds_floats(self.tiles * TILE, self.token_tiles * TILE) if self.packed else 0
        return self.side_at + listed


class Product:
    """Registers and LDS of a thread block's products, and the code that computes one."""

    def __init__(self, shape: Shape, K: int, thread: Any) -> None:
        self.shape, self._K, self._thread = shape, K, thread
        self._acc = IRBuilder.name("acc", T.alloc_buffer((shape.sums * 4,), "float32", scope="local"))
        size = shape.steps * shape.token_tiles * OWN
        self._b = IRBuilder.name("b", T.alloc_buffer((size,), "uint16", scope="local"))
        self._total = IRBuilder.name("total", T.alloc_buffer((2 * 4,), "float32", scope="local"))
        if shape.lds_floats:
            buffer = T.alloc_buffer((shape.lds_floats,), "float32", scope="shared")
            self.shared = IRBuilder.name("shared", buffer)
        self._wave = T.Bind(uniform(thread // WAVE))
        self.place = Place(T.Bind(thread % TILE), T.Bind(thread % WAVE // TILE))

    def accumulate(self, weights: Plain | Packed, x: tirx.Buffer, x_from: Sequence[Any]) -> None:
        """The sums of the wave's columns; `x_from` is where the lane's token of each tile starts in x."""
        shape = self.shape
        for i in range(shape.sums):
            store(self._acc, i * 4, T.broadcast(T.float32(0), 4), 4)
        with T.serial(self._K // BLOCK // (shape.waves * shape.steps)) as turn:
            for step in range(shape.steps):
                block = (turn * shape.steps + step) * shape.waves + self._wave
                weights.load(step, block)
                for m, start in enumerate(x_from):
                    for v in range(OWN // VECTOR):
                        values = x.vload([start + block * BLOCK + weights.column(v)], f"uint16x{VECTOR}")
                        store(self._b, (step * shape.token_tiles + m) * OWN + v * VECTOR, values, VECTOR)
            schedule_barrier()
            for step in range(shape.steps):
                self._multiply(weights, step)

    def _multiply(self, weights: Plain | Packed, step: int) -> None:
        shape = self.shape
        weights.unpack(step)
        for i in range(OWN // 4):
            for m in range(shape.token_tiles):
                of_b = self._b.vload([(step * shape.token_tiles + m) * OWN + i * 4], "uint16x4")
                for tile in range(shape.tiles):
                    to = (tile * shape.token_tiles + m) * 4
                    product = mfma(weights.operand(step, tile, i), of_b, self._acc.vload([to], "float32x4"))
                    store(self._acc, to, product, 4)

    def write(self, weights: Plain | Packed, side: SideList | None, write: Write) -> None:
        """Have each lane `write` sums of the whole product."""
        shape = self.shape
        pairs = shape.row_tiles * shape.token_tiles
        if not shape.side_at:
            for pair in range(pairs):
                tile, m = divmod(pair, shape.token_tiles)
                for part in range(2 if shape.gated else 1):
                    at = ((2 * tile + part if shape.gated else tile) * shape.token_tiles + m) * 4
                    store(self._total, part * 4, self._acc.vload([at], "float32x4"), 4)
                write(self._total, tile * TILE + self.place.quarter * 4, m * TILE + self.place.at)
            return
        for i in range(shape.sums):
            to = ((self._wave * shape.sums + i) * WAVE + self._thread % WAVE) * 4
            store(self.shared, to, self._acc.vload([i * 4], "float32x4"), 4)
        with T.serial(-(-pairs // shape.waves)) as turn:
            pair = T.Bind(turn * shape.waves + self._wave)
            tile, m = T.Bind(pair // shape.token_tiles), T.Bind(pair % shape.token_tiles)
            with T.If(pair < pairs), T.Then():
                self._add_up(weights, side, 0, 2 * tile if shape.gated else tile, m)
                if shape.gated:
                    self._add_up(weights, side, 1, 2 * tile + 1, m)
                write(self._total, tile * TILE + self.place.quarter * 4, m * TILE + self.place.at)

    def _add_up(self, weights: Plain | Packed, side: SideList | None, part: int, tile: Any, m: Any) -> None:
        """total[4 * part ...] = the waves' sums for four rows of a tile."""
        shape = self.shape
        product, lane = weights.sum_of(tile)
        at = (product * shape.token_tiles + m) * WAVE + lane
        terms = [self.shared.vload([(w * shape.sums * WAVE + at) * 4], "float32x4") for w in range(shape.waves)]
        store(self._total, part * 4, sum(terms[1:], terms[0]), 4)
        if side is not None:
            for i in range(4):
                row = tile * TILE + self.place.quarter * 4 + i
                whole = side.complete(self._total[part * 4 + i], row, m * TILE + self.place.at)
                T.buffer_store(self._total, whole, [part * 4 + i])


def finish(tensors: Mapping[str, tirx.Buffer], total: tirx.Buffer, gated: bool, token: Any, n: Any) -> None:
    """out[token, n : n + 4]: bias in float32, rounding, residual; or the gate: as the references do."""
    for i in range(4):
        y = total[i]
        if gated:
            y = silu(rounded(y, "bfloat16")) * rounded(total[4 + i], "bfloat16")
        if "bias" in tensors:
            y = y + T.Cast("float32", tensors["bias"][n + i])
        if "residual" in tensors:
            y = T.Cast("float32", tensors["residual"][token, n + i]) + rounded(y, "bfloat16")
        T.buffer_store(total, y, [i])
    with T.vectorized(4) as i:
        T.buffer_store(tensors["out"], T.Cast("bfloat16", total[i]), [token, n + i])
