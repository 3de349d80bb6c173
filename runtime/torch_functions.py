"""What the steps of a torch program call: every function takes tensors of static shapes and reads no value on the host.

T is requests times queries.  A table of blocks has a row for each KV block that is read: its number, the request (row
of the batch) whose it is, and the position of its first token; rows of padding have positions that no request reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from vllm_compile.evaluate import evaluate, input_views
from vllm_compile.expression import read_expression

from .tpc_kernels import kernel_of


def embedding(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ids [T], table [V, D] -> [T, D]"""
    return functional.embedding(ids, table)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N], residual [T, N] -> [T, N]; the residual is added to the rounded product."""
    product = functional.linear(x, weight, bias)
    return product if residual is None else residual + product


def fused(
    expression: Sequence[Any], results: Sequence[int], kernel: str | None = None, **inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """An expression's results: by our kernel where it is loaded for the device, else by torch's own operators."""
    nodes = read_expression(expression)
    compiled = kernel_of(kernel, next(iter(inputs.values())).device)
    if compiled is not None:
        return compiled(*(view.contiguous() for view in input_views(nodes, inputs)))
    values = evaluate(nodes, inputs, torch.float32)
    return tuple(values[number] for number in results)


def kv_cache_write(
    k: torch.Tensor, kv: torch.Tensor, slot_mapping: torch.Tensor, v: torch.Tensor | None = None
) -> tuple[()]:
    """Write k [T, KH, D], v [T, KH, DV] into kv [B, KH, N, D + DV] where slot_mapping [T] says; slot -1 is not written.

    Shapes are static, so a token without a slot writes what another writes there, or, where no token has a
    slot, what is there.
    """
    new_TKC = k if v is None else torch.cat([k, v], dim=-1)
    anchor = (slot_mapping >= 0).int().argmax()
    source_T = torch.where(slot_mapping >= 0, torch.arange(len(slot_mapping), device=k.device), anchor)
    slots_T = slot_mapping[source_T]
    blocks_T, offsets_T = slots_T.clamp(min=0) // kv.shape[2], slots_T.clamp(min=0) % kv.shape[2]
    old_TKC = kv[blocks_T, :, offsets_T]
    kv[blocks_T, :, offsets_T] = torch.where(slots_T[:, None, None] >= 0, new_TKC[source_T], old_TKC)
    return ()


def split_and_cache(
    rotated: torch.Tensor, qkv: torch.Tensor, kv: torch.Tensor, slot_mapping: torch.Tensor
) -> torch.Tensor:
    """rotated [T, H + KH, D] and qkv [T, (H + 2 * KH) * D]: caches k and v, returns q [T, H, D]."""
    tokens, kv_heads, head_dim = qkv.shape[0], kv.shape[1], rotated.shape[2]
    v = qkv.view(tokens, -1, head_dim)[:, -kv_heads:]
    kv_cache_write(rotated[:, -kv_heads:], kv, slot_mapping, v)
    return rotated[:, :-kv_heads]


def paged_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    """q [T, H, D], kv [B, KH, N, D + DV], block_table a table of blocks [L, 3], seq_lens [R], query_start_loc [R + 1].

    Queries of a request are T / R rows, of which the first query_start_loc[r + 1] - query_start_loc[r] are real.
    """
    call = _Attention(q, kv, block_table, seq_lens.long(), query_start_loc.diff(), scale, window, soft_cap)
    return _decode(call) if q.shape[0] == seq_lens.shape[0] else _prefill(call)


class _Attention(NamedTuple):
    """The arguments of `paged_attention`, int64; `counts` [R] are the real queries of each request."""

    q: torch.Tensor
    kv: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    counts: torch.Tensor
    scale: float
    window: int
    soft_cap: float

    def positions(self) -> torch.Tensor:
        """[L, N]: of each token of each block, in its request."""
        offset_N = torch.arange(self.kv.shape[2], device=self.q.device)
        return self.table[:, 2, None] + offset_N

    def scores(self, product: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Products of queries and keys as float32 scores, minus infinity where a query does not see."""
        scores = product.float() * self.scale
        if self.soft_cap:
            scores = torch.tanh(scores / self.soft_cap) * self.soft_cap
        return scores.masked_fill(~visible, float("-inf"))


def _decode(a: _Attention) -> torch.Tensor:
    """One query a request: each block by itself, then the blocks of each request together (a softmax in two parts)."""
    requests, heads, head_dim = a.q.shape
    kv_heads = a.kv.shape[1]
    rows_L, position_LN = a.table[:, 1], a.positions()
    length_L1 = a.lengths[rows_L, None]
    visible_LN = position_LN < length_L1
    if a.window:
        visible_LN = visible_LN & (position_LN >= length_L1 - a.window)
    k_LKND, v_LKND = a.kv[a.table[:, 0]].tensor_split([head_dim], dim=-1)
    v_LKND = v_LKND.masked_fill(~visible_LN[:, None, :, None], 0)  # what nobody wrote may be no number
    q_LKGD = a.q.view(requests, kv_heads, heads // kv_heads, head_dim)[rows_L]
    scores_LKGN = a.scores(q_LKGD @ k_LKND.transpose(-1, -2), visible_LN[:, None, None])
    mine_LR = rows_L[:, None] == torch.arange(requests, device=rows_L.device)
    top_LKG = scores_LKGN.amax(-1)
    top_RKG = torch.where(mine_LR[:, :, None, None], top_LKG[:, None], float("-inf")).amax(0)
    top_RKG = top_RKG.masked_fill(top_RKG == float("-inf"), 0.0)
    weights_LKGN = torch.exp(scores_LKGN - top_RKG[rows_L][..., None])
    gather_RL = mine_LR.T.float()
    total_RKG = (gather_RL @ weights_LKGN.sum(-1).flatten(1)).view(top_RKG.shape)
    mixed_LKGD = (weights_LKGN.to(v_LKND.dtype) @ v_LKND).float()
    out_RKGD = (gather_RL @ mixed_LKGD.flatten(1)).view(*top_RKG.shape, -1)
    least = torch.finfo(torch.float32).tiny  # a request of padding sees nothing
    return (out_RKGD / total_RKG.clamp(min=least)[..., None]).to(a.q.dtype).view(requests, heads, -1)


def _prefill(a: _Attention) -> torch.Tensor:
    """Several queries a request: all queries with all blocks, and a mask."""
    tokens, heads, head_dim = a.q.shape
    kv_heads, requests = a.kv.shape[1], a.lengths.shape[0]
    queries = tokens // requests
    row_T = torch.arange(requests, device=a.q.device).repeat_interleave(queries)
    at_T = (a.lengths - a.counts)[row_T] + torch.arange(tokens, device=row_T.device) % queries
    position_S = a.positions().flatten()
    row_S = a.table[:, 1].repeat_interleave(a.kv.shape[2])
    written_S = position_S < a.lengths[row_S]
    visible_TS = written_S & (row_T[:, None] == row_S) & (position_S <= at_T[:, None])
    if a.window:
        visible_TS = visible_TS & (position_S > at_T[:, None] - a.window)
    pages_KSC = a.kv[a.table[:, 0]].transpose(0, 1).flatten(1, 2)
    k_KSD, v_KSD = pages_KSC.masked_fill(~written_S[:, None], 0).tensor_split([head_dim], dim=-1)
    q_KGTD = a.q.view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    scores_KGTS = a.scores(q_KGTD @ k_KSD[:, None].transpose(-1, -2), visible_TS)
    # A query of padding may see nothing: its weights are made zeros, not what 0 / 0 is.
    weights_KGTS = scores_KGTS.softmax(-1).nan_to_num(0.0).to(v_KSD.dtype)
    return (weights_KGTS @ v_KSD[:, None]).permute(2, 0, 1, 3).reshape(tokens, heads, -1)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    f.__name__: f for f in (embedding, linear, fused, kv_cache_write, split_and_cache, paged_attention)
}
