"""What libraries of the serving environment do better in large batches: cuBLASLt's products, FlashAttention's prefill.

A plan names these functions; they get tensors by name and fill `out`.  Weights are plain bf16.  On AMD GPUs torch's
products are hipBLASLt's, and our own kernels do prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from vllm_compile.errors import TargetError

VERSION = 3  # of FlashAttention: Hopper's


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> None:
    """x [T, K], weight [N, K], bias [N], residual and out [T, N]: out = residual + (x @ weight.T + bias).

    With a residual alone, it is added in float32 before the one rounding, and may be `out` itself.
    """
    if bias is not None:
        torch.addmm(bias, x, weight.T, out=out)
        if residual is not None:
            out += residual
    elif residual is not None:
        torch.addmm(residual, x, weight.T, out=out)
    else:
        torch.mm(x, weight.T, out=out)


def paged_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
) -> None:
    """FlashAttention as vLLM ships it; shapes and cap are those of the operator `paged_attention`, without a window.

    The longest query and context are not known on the host: T and the block table's width bound them.
    """
    attention = _flash_attention()
    if attention is None:
        raise TargetError("vLLM's FlashAttention for Hopper is not here; see `available`")
    k, v = (half.transpose(1, 2) for half in kv.chunk(2, dim=-1))
    attention(
        q=q,
        k=k,
        v=v,
        out=out,
        cu_seqlens_q=query_start_loc,
        max_seqlen_q=q.shape[0],
        seqused_k=seq_lens,
        max_seqlen_k=block_table.shape[1] * kv.shape[2],
        block_table=block_table,
        softmax_scale=scale,
        causal=True,
        softcap=soft_cap,
        fa_version=VERSION,
    )


@cache
def _flash_attention() -> Callable[..., Any] | None:
    """vLLM's FlashAttention for Hopper, or None where there is no vLLM."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
        from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported
    except ImportError:
        return None
    return flash_attn_varlen_func if is_fa_version_supported(VERSION) else None


def available(function: str) -> bool:
    """True if the function called so can be used in this process; where not, our kernels serve all batches."""
    return function != "paged_attention" or _flash_attention() is not None


FUNCTIONS: Mapping[str, Callable[..., None]] = {"linear": linear, "paged_attention": paged_attention}
