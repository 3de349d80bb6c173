"""The inputs of a decode step whose requests are those of the step before, written by one kernel.

vLLM has a kernel for positions and lengths, one for tokens, one for slots, and one for the blocks of requests that got
one: they know no step before.  To launch one takes 24 microseconds of an H200's host, where Llama-3.2-1B's step takes
690 (benchmarks/baseline.md).
"""

from __future__ import annotations

import torch
from vllm.triton_utils import tl, triton


def advance_step(
    places: torch.Tensor,
    computed: torch.Tensor,
    sampled: torch.Tensor,
    blocks: torch.Tensor,
    block_size: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes the last five, of R requests that decode a token each; what is behind their rows stays as it is.

    A request's block is written where this step's token is cached, as it may have got it since the step before.

    Args:
        places: int32 (vLLM 0.32: int64) [R], each request's row in the next three.
        computed: int32 [S], tokens that are cached.
        sampled: int64 [S, 1], the token that was sampled last.
        blocks: int32 [S, W], blocks in order.
        block_size: int32 [1], tokens of a block.
        input_ids, positions, seq_lens: int32, int64, int32, at least [R].
        block_table: int32, at least [R, W].
        slot_mapping: int64, at least [R].
    """
    _advance_step[(places.shape[0],)](
        places,
        computed,
        sampled,
        sampled.stride(0),
        blocks,
        blocks.stride(0),
        block_size,
        input_ids,
        positions,
        seq_lens,
        block_table,
        block_table.stride(0),
        slot_mapping,
        num_warps=1,
    )


@triton.jit
def _advance_step(  # type: ignore[no-untyped-def]  # Triton reads annotations as types of its own
    places,
    computed,
    sampled,
    sampled_stride,
    blocks,
    blocks_stride,
    block_size,
    input_ids,
    positions,
    seq_lens,
    block_table,
    block_table_stride,
    slot_mapping,
):
    row = tl.program_id(0)
    place = tl.load(places + row).to(tl.int64)
    position = tl.load(computed + place)
    size = tl.load(block_size)
    column = position // size
    block = tl.load(blocks + place * blocks_stride + column)
    tl.store(input_ids + row, tl.load(sampled + place * sampled_stride).to(tl.int32))
    tl.store(positions + row, position.to(tl.int64))
    tl.store(seq_lens + row, position + 1)
    tl.store(block_table + row.to(tl.int64) * block_table_stride + column, block)
    tl.store(slot_mapping + row, block.to(tl.int64) * size + position % size)
