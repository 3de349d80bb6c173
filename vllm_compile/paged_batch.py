"""A batch as a serving engine lays it out: the smallest engine there is.

Verification and tests run programs with it; it also shows what an engine of your own must do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from .runtime.plan import ModelShape

BLOCK_SIZE = 16
CPU = torch.device("cpu")


class PagedBatch:
    """Requests of given lengths in a paged KV cache; blocks are handed out in reverse order.

    The cache starts as NaN, so that reading what was not written shows.

    Attributes:
        kv: one cache per layer, [blocks, kv_heads, BLOCK_SIZE, cache_width].
        block_table: int32 [R, W]; block 0, which nobody has, fills it up.
    """

    def __init__(self, model: ModelShape, lengths: Sequence[int], device: torch.device = CPU) -> None:
        widths = [-(-length // BLOCK_SIZE) for length in lengths]
        count = sum(widths) + 1
        shape = (count, model.num_kv_heads, BLOCK_SIZE, model.cache_width)
        dtype = getattr(torch, model.dtype)
        self.kv = [torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in range(model.num_layers)]
        order = torch.arange(count - 1, 0, -1, dtype=torch.int32, device=device)
        self.block_table = pad_sequence(order.split(widths), batch_first=True)

    def step(self, begin: Sequence[int], end: Sequence[int]) -> dict[str, torch.Tensor]:
        """Arguments of `Program.forward` for feeding tokens begin[r] to end[r] of each request r."""
        device = self.block_table.device
        counts = torch.tensor([e - b for b, e in zip(begin, end, strict=True)], device=device)
        positions = torch.cat([torch.arange(b, e, device=device) for b, e in zip(begin, end, strict=True)])
        rows = torch.repeat_interleave(torch.arange(len(begin), device=device), counts)
        blocks = self.block_table[rows, positions // BLOCK_SIZE].long()
        return {
            "positions": positions,
            "block_table": self.block_table,
            "seq_lens": torch.tensor(end, dtype=torch.int32, device=device),
            "query_start_loc": torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
            "slot_mapping": blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
        }
