"""Panels of lossless 12-bit weights: what a CPU streams (the format's idea: `vllm_compile/lossless.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_compile import lossless

GROUP = 4  # words of K whose codes are stored together, in the place of three
# The kernel's instructions for the words of a group, each of `lanes` int32 with two weights; one multiply-add is two
# FLOPs of each of as many floats.
UNPACK_INSTRUCTIONS = 21


@dataclass(frozen=True)
class LosslessPanels:
    """[N, K] bf16 -> uint8 [bytes]: the words of `Panels(lanes, 2, gated)`, four in the place of three.

    Little-endian (P = N / lanes panels):

    | part | type and shape | content |
    |---|---|---|
    | codes | uint32 [P, K / 8, 3, lanes] | four words of K, joined by `lossless.join`; each has two codes of a row |
    | bases | uint32 [N] | of each row: the exponent field that 0 stands for, in both halves of a word |
    | first | uint32 [P + 1] | the first side entry of each panel |
    | side | {uint32 place, float32 value} [capacity] | k * lanes + lane, and the weight itself; ascending in K |

    A code that is not zero becomes the weight when the base is added to it; a weight of the side list has code 0.
    """

    lanes: int
    gated: bool = False
    lossless: bool = True
    unpack_flops: float = 2 * UNPACK_INSTRUCTIONS / (2 * GROUP)

    @property
    def name(self) -> str:
        return f"lossless_panels{self.lanes}{'_gated' if self.gated else ''}"

    def serves(self, N: int, K: int) -> bool:
        """True if [N, K] is made of whole panels and groups."""
        return N % (self.lanes * (2 if self.gated else 1)) == 0 and K % (2 * GROUP) == 0 and min(N, K) > 0

    def offsets(self, N: int, K: int) -> tuple[int, int, int, int]:
        """int32 words from the start to the bases, to `first` and to the side list, all on cache lines; to the end."""
        sizes = (N * K * 3 // 8, N, N // self.lanes + 1)
        ends = [0]
        for size in sizes:
            ends.append(ends[-1] + -(-size // 16) * 16)
        return ends[1], ends[2], ends[3], ends[3] + 2 * lossless.capacity(N, K)

    def shape(self, plain: tuple[int, ...]) -> tuple[int, ...]:
        N, K = plain
        return (4 * self.offsets(N, K)[3],)

    def dtype(self, plain: str) -> str:
        return "uint8"

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The packed weight.

        Raises:
            ValueError: too many weights lie outside their row's window of exponents.
        """
        N, K = weight.shape
        bases_at, first_at, side_at, end = self.offsets(N, K)
        packed = torch.zeros(end, dtype=torch.int32)
        panels, groups = N // self.lanes, K // (2 * GROUP)
        codes = packed[: N * K * 3 // 8].view(panels, groups, 3, self.lanes)
        bases = packed[bases_at : bases_at + N].view(panels, self.lanes)
        entries = []
        for panel, rows in self._chunks(weight):
            code, base, row, k = lossless.encode(rows)
            words = code.bitwise_or_(rows & lossless.SIGN).view(torch.int32).view(-1, self.lanes, groups, GROUP)
            lossless.join(words.permute(3, 0, 2, 1).contiguous(), codes[panel].permute(2, 0, 1, 3))
            bases[panel] = ((base.int() << lossless.MANTISSA_BITS) * 0x10001).view(-1, self.lanes)
            numbers, place = torch.arange(panels)[panel][row // self.lanes], k * self.lanes + row % self.lanes
            entries.append(torch.stack((numbers, place, rows[row, k].long() << 16), dim=1))
        side = torch.cat(entries)
        if len(side) > lossless.capacity(N, K):
            raise ValueError(
                f"{len(side)} weights of {[N, K]} lie outside the windows of {lossless.EXPONENTS} exponents; "
                f"at most {lossless.capacity(N, K)} can be listed"
            )
        side = side[(side[:, 0] * K * self.lanes + side[:, 1]).argsort()]
        counts = torch.bincount(side[:, 0], minlength=panels)
        packed[first_at + 1 : first_at + 1 + panels] = counts.cumsum(0)
        packed[side_at : side_at + 2 * len(side)] = side[:, 1:].reshape(-1).int()
        return packed.view(torch.uint8)

    def _chunks(self, weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weight's bits, some rows at a time, and which panels they become."""
        halves = 2 if self.gated else 1
        step = max(lossless.CHUNK_BYTES // (2 * weight.shape[1]) // self.lanes, 1)
        for half, rows in enumerate(weight.contiguous().view(torch.int16).chunk(halves)):
            for number, chunk in enumerate(rows.split(step * self.lanes)):
                start = number * step * halves + half
                yield slice(start, start + len(chunk) // self.lanes * halves, halves), chunk
