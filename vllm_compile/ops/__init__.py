"""The operators that carry a Transformer's meaning through the passes: one file each."""

from typing import Any

from .add_rms_norm import ADD_RMS_NORM
from .argmax import ARGMAX
from .base import OwnOp, Tolerance
from .causal_attention import CAUSAL_ATTENTION
from .elementwise import ELEMENTWISE
from .embedding import EMBEDDING
from .expert_gate_up_silu import EXPERT_GATE_UP_SILU
from .expert_linear import EXPERT_LINEAR
from .gate_up_silu import GATE_UP_SILU
from .head_linear import HEAD_LINEAR
from .kv_cache_write import KV_CACHE_WRITE
from .layer_boundary import LAYER_BOUNDARY
from .layer_norm import LAYER_NORM
from .limit_groups import LIMIT_GROUPS
from .linear import LINEAR
from .moe import MOE
from .paged_attention import PAGED_ATTENTION
from .qkv_rope_attention import QKV_ROPE_ATTENTION
from .qkv_rope_cache import QKV_ROPE_CACHE
from .rms_norm import RMS_NORM
from .route import ROUTE
from .silu_mul import SILU_MUL

OPS: dict[str, OwnOp] = {
    op.name: op
    for op in (
        ADD_RMS_NORM,
        ARGMAX,
        CAUSAL_ATTENTION,
        ELEMENTWISE,
        EMBEDDING,
        EXPERT_GATE_UP_SILU,
        EXPERT_LINEAR,
        GATE_UP_SILU,
        HEAD_LINEAR,
        KV_CACHE_WRITE,
        LAYER_BOUNDARY,
        LAYER_NORM,
        LIMIT_GROUPS,
        LINEAR,
        MOE,
        PAGED_ATTENTION,
        QKV_ROPE_ATTENTION,
        QKV_ROPE_CACHE,
        RMS_NORM,
        ROUTE,
        SILU_MUL,
    )
}


def op_of(expr: Any) -> OwnOp | None:
    """The operator of ours that `expr` is a call of, else None."""
    return next((op for op in OPS.values() if op.matches(expr)), None)


__all__ = [*(name.upper() for name in OPS), "OPS", "OwnOp", "Tolerance", "op_of"]
