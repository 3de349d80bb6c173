"""A step of any shape, run as steps of the shapes that there are graphs of.

Requests that decode are one batch, each longer prompt is a batch of its own, as vLLM-Gaudi runs them.  Rows of padding
have no tokens; tokens of padding come behind a request's real ones and have no slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_compile.errors import BucketError

from .buckets import Bucket, BucketPlan

NOWHERE = 1 << 30  # a position that no request reaches


@dataclass(frozen=True)
class Lengths:
    """Of each request, on the host: tokens of this step, and tokens cached once it is done."""

    queries: Sequence[int]
    cached: Sequence[int]


@dataclass(frozen=True)
class Padded:
    """A batch in a bucket.

    Attributes:
        inputs: by name, as the program's `forward` has them; `block_table` is a table of blocks (torch_functions.py).
        taken: index of each real token in the padded batch.
        places: its index in the whole step.
    """

    inputs: dict[str, torch.Tensor]
    taken: torch.Tensor
    places: torch.Tensor


def batches_of(lengths: Lengths, together: bool) -> list[list[int]]:
    """The requests of each batch; all in one if `together`.  Requests without tokens are in none."""
    live = [r for r, queries in enumerate(lengths.queries) if queries]
    if together:
        return [live] if live else []
    decodes = [r for r in live if lengths.queries[r] == 1]
    return [*([decodes] if decodes else []), *([r] for r in live if lengths.queries[r] > 1)]


def shape_of(batch: Sequence[int], lengths: Lengths, block_size: int) -> Bucket:
    """The exact shape of a batch."""
    queries = max(lengths.queries[r] for r in batch)
    read = [lengths.cached[r] - (0 if queries == 1 else lengths.queries[r]) for r in batch]
    return Bucket(len(batch), queries, sum(-(-tokens // block_size) for tokens in read))


def bucket_of(shape: Bucket, plan: BucketPlan | None, block_size: int) -> Bucket:
    """The bucket that a batch of this shape runs in; without a plan its own.

    Raises:
        BucketError: the plan is for blocks of another size, or has no bucket for it.
    """
    if plan is None:
        return shape
    if plan.block_size != block_size:
        raise BucketError(
            f"the buckets are for KV blocks of {plan.block_size} tokens; the cache has blocks of {block_size}"
        )
    found = plan.find(shape)
    if found is None:
        raise BucketError(
            f"no bucket covers {list(shape)} (requests, tokens of each, KV blocks); plan for larger limits"
        )
    return found


def table_length(bucket: Bucket, block_size: int) -> int:
    """Rows of the table of blocks: those of earlier steps, and what a prompt's own tokens may fill."""
    own = 0 if bucket.decodes else bucket.batch * -(-bucket.queries // block_size)
    return bucket.blocks + own


def pad(
    step: Mapping[str, torch.Tensor], lengths: Lengths, batch: Sequence[int], bucket: Bucket, block_size: int
) -> Padded:
    """The requests `batch` of a step (its tensors by name) as a batch of the bucket's shape."""
    device = step["input_ids"].device
    starts = [sum(lengths.queries[:r]) for r in batch]
    where: list[int] = []
    places: list[int] = []
    for row, (request, start) in enumerate(zip(batch, starts, strict=True)):
        count = lengths.queries[request]
        where += range(row * bucket.queries, row * bucket.queries + count)
        places += range(start, start + count)
    token = [places[0]] * (bucket.batch * bucket.queries)
    for padded, place in zip(where, places, strict=True):
        token[padded] = place

    def tensor(values: Sequence[object], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    token_T, taken_T = tensor(token), tensor(where)
    slots_T = torch.full((len(token),), -1, dtype=torch.int64, device=device)
    places_T = tensor(places)
    slots_T[taken_T] = step["slot_mapping"][places_T]
    rows = len(batch)
    counts = [lengths.queries[r] for r in batch] + [0] * (bucket.batch - rows)
    ends = [sum(counts[:n]) for n in range(len(counts) + 1)]
    return Padded(
        {
            "input_ids": step["input_ids"][token_T],
            "positions": step["positions"][token_T],
            "slot_mapping": slots_T,
            "block_table": _table(step["block_table"], lengths, batch, table_length(bucket, block_size), block_size),
            "seq_lens": tensor([lengths.cached[r] for r in batch] + [0] * (bucket.batch - rows), torch.int32),
            "query_start_loc": tensor(ends, torch.int32),
        },
        taken_T,
        places_T,
    )


def _table(
    block_table: torch.Tensor, lengths: Lengths, batch: Sequence[int], length: int, block_size: int
) -> torch.Tensor:
    """The blocks of the batch's requests, one after the other: [length, 3]."""
    counts = [-(-lengths.cached[r] // block_size) for r in batch]
    rows = [row for row, count in enumerate(counts) for _ in range(count)]
    columns = [column for count in counts for column in range(count)]
    table = torch.zeros((length, 3), dtype=torch.int64, device=block_table.device)
    table[:, 2] = NOWHERE
    index = torch.tensor([[batch[row], column] for row, column in zip(rows, columns, strict=True)], dtype=torch.int64)
    request_L, column_L = index.to(block_table.device).unbind(1)
    used = len(rows)
    table[:used, 0] = block_table[request_L, column_L].long()
    table[:used, 1] = torch.tensor(rows, dtype=torch.int64).to(table.device)
    table[:used, 2] = column_L * block_size
    return table
