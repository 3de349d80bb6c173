"""Weight layouts: how a plain weight is rearranged once, at compile time, for a kernel to stream.

A layout is a pure function of one torch tensor, named so that a plan can say which one a
stored weight has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Layout(Protocol):
    """A rearrangement of a weight."""

    @property
    def name(self) -> str:
        """What the plan calls it."""

    @property
    def lossless(self) -> bool:
        """True if it takes fewer bytes and may not hold every weight: `pack` raises ValueError for one."""

    @property
    def unpack_flops(self) -> float:
        """What a kernel could do instead of restoring one weight; 0 where the hardware does that beside its reads."""

    def shape(self, plain: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the packed tensor for a plain weight of shape `plain`."""

    def dtype(self, plain: str) -> str:
        """Its dtype, for a plain weight of dtype `plain`."""

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """The packed, contiguous tensor."""


@dataclass(frozen=True)
class Panels:
    """[N, K] -> [N/lanes, K/pair, lanes, pair]: `lanes` outputs side by side, `pair` values of K together.

    A vector register then holds the same `pair` values of K for `lanes` outputs, and a kernel
    streams each panel from front to back.  `pair` is 2 for bf16 (the operand of vdpbf16ps) and
    1 for float32.  N is padded with zeros to whole panels, K to whole pairs.
    Matrices of several experts [E, N, K] are laid out one behind the other, [E, ...].
    `gated` interleaves the panels of the two halves of N (gate, up, gate, up, ...), so that one
    kernel holds both halves of a gated MLP in registers.
    """

    lanes: int
    pair: int
    gated: bool = False
    lossless: bool = False
    unpack_flops: float = 0.0

    @property
    def name(self) -> str:
        return f"panels{self.lanes}x{self.pair}{'_gated' if self.gated else ''}"

    def shape(self, plain: tuple[int, ...]) -> tuple[int, ...]:
        *experts, N, K = plain
        halves = 2 if self.gated else 1
        panels = halves * -(-N // halves // self.lanes)
        return (*experts, panels, -(-K // self.pair), self.lanes, self.pair)

    def dtype(self, plain: str) -> str:
        return plain

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.dim() == 3:
            packed = torch.empty(self.shape(tuple(weight.shape)), dtype=weight.dtype)
            for to, expert in zip(packed, weight, strict=True):
                to.copy_(self.pack(expert))
            return packed
        halves = weight.chunk(2) if self.gated else (weight,)
        panels = [self._pack(half) for half in halves]
        return torch.stack(panels, dim=1).flatten(0, 1).contiguous() if self.gated else panels[0]

    def _pack(self, weight_NK: torch.Tensor) -> torch.Tensor:
        N, K = weight_NK.shape
        pad = (0, -K % self.pair, 0, -N % self.lanes)
        padded = torch.nn.functional.pad(weight_NK, pad) if any(pad) else weight_NK
        tiled = padded.view(-1, self.lanes, padded.shape[1] // self.pair, self.pair)
        return tiled.transpose(1, 2).contiguous()
