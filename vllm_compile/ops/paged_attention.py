"""Causal grouped-query attention over a paged KV cache, for decode, prefill and mixed batches alike."""

import torch
from torch.nn.utils.rnn import pad_sequence

from .base import OwnOp, Tolerance, like

TOLERANCE = {
    "float32": Tolerance(1e-4, 1e-5, "an online softmax adds the same terms in another order"),
    "bfloat16": Tolerance(2**-6, 1e-2, "probabilities may be rounded to bf16 before they weigh the values"),
}


def unseen(query_position: torch.Tensor, position: torch.Tensor, window: int) -> torch.Tensor:
    """bool [queries, positions]: what a query does not see, the future and what lies before its window."""
    distance = query_position[:, None] - position
    future = distance < 0
    return future | (distance >= window) if window else future


def capped(scores: torch.Tensor, soft_cap: float) -> torch.Tensor:
    """Scores squeezed into (-soft_cap, soft_cap); 0 leaves them as they are."""
    return torch.tanh(scores / soft_cap) * soft_cap if soft_cap else scores


def reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    shared_values: int = 0,
    prompts: int = 0,
) -> torch.Tensor:
    """Returns [T, H, DV]; rows that belong to no request are left undefined (zeros here).

    q [T, H, D], kv [B, KH, N, D + DV] (K, then V in the last axis), block_table [R, W] int32, seq_lens [R] int32
    (cached tokens including this step's; 0 for a padding row), query_start_loc [R + 1] int32.  Query i of
    request r stands at position seq_lens[r] - queries + i and sees the positions up to its own, the last
    `window` of them if that is not 0.  Scores may be soft-capped (Gemma 2).
    With `shared_values` kv is [B, KH, N, D], and V is its first so many columns: the latent cache of DeepSeek-V2.
    `prompts` says that most requests have several queries, which changes nothing here.
    Computes in float32 (float64 for a float64 q) and rounds once at the end.
    """
    head_dim, block_size, value_dim = q.shape[2], kv.shape[2], shared_values or kv.shape[3] - q.shape[2]
    out = q.new_zeros(*q.shape[:2], value_dim)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // kv.shape[1]
    for r, length in enumerate(seq_lens.tolist()):
        begin, end = int(query_start_loc[r]), int(query_start_loc[r + 1])
        if length == 0 or begin == end:
            continue
        pages = kv[block_table[r, : -(-length // block_size)].long()].to(wide)
        cached = pages.transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(group, 0)
        k = cached[..., :head_dim]
        v = cached[..., :shared_values] if shared_values else cached[..., head_dim:]
        scores = torch.einsum("thd,hsd->hts", q[begin:end].to(wide), k) * scale
        position = torch.arange(length - (end - begin), length)
        hidden = unseen(position, torch.arange(length), window)
        weights = capped(scores, soft_cap).masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hts,hsd->thd", weights, v).to(q.dtype)
    return out


def sample(
    generator: torch.Generator,
    dtype: torch.dtype,
    lengths: tuple[tuple[int, int], ...] = ((1, 1), (1, 37), (9, 9), (5, 30), (0, 0)),
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    block_size: int = 16,
    columns: int = 0,
):
    """`lengths` holds (queries, cached tokens) per request; blocks are handed out in random order, one to nobody.

    The cache has `columns`, or twice the head size where 0.
    """
    columns = columns or 2 * head_dim
    widths = [-(-length // block_size) + 1 for _, length in lengths]
    blocks = torch.randperm(sum(widths) + 1, generator=generator).int()
    queries = torch.tensor([count for count, _ in lengths])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), queries.cumsum(0)])
    inputs = {
        "q": torch.randn(int(queries.sum()), num_heads, head_dim, generator=generator).to(dtype),
        "kv": torch.randn(blocks.numel(), num_kv_heads, block_size, columns, generator=generator).to(dtype),
        "block_table": pad_sequence(blocks[:-1].split(widths), batch_first=True, padding_value=float(blocks[-1])),
        "seq_lens": torch.tensor([length for _, length in lengths], dtype=torch.int32),
        "query_start_loc": starts.int(),
    }
    return inputs, {"scale": head_dim**-0.5}


def infer(i, a):
    keys, columns = (int(i[name].shape.values[-1]) for name in ("q", "kv"))
    return like(i["q"], last=[a.get("shared_values") or columns - keys])


PAGED_ATTENTION = OwnOp(
    "paged_attention", infer, reference, sample, TOLERANCE, options=("window", "soft_cap", "shared_values", "prompts")
)
