"""The operators that carry a Transformer's meaning through the passes: one file each."""

from .add_rms_norm import ADD_RMS_NORM
from .base import OwnOp, Tolerance
from .causal_attention import CAUSAL_ATTENTION
from .elementwise import ELEMENTWISE
from .embedding import EMBEDDING
from .gate_up_silu import GATE_UP_SILU
from .kv_cache_write import KV_CACHE_WRITE
from .layer_boundary import LAYER_BOUNDARY
from .layer_norm import LAYER_NORM
from .linear import LINEAR
from .paged_attention import PAGED_ATTENTION
from .qkv_rope_cache import QKV_ROPE_CACHE
from .rms_norm import RMS_NORM
from .silu_mul import SILU_MUL

OPS: dict[str, OwnOp] = {
    op.name: op
    for op in (
        ADD_RMS_NORM,
        CAUSAL_ATTENTION,
        ELEMENTWISE,
        EMBEDDING,
        GATE_UP_SILU,
        KV_CACHE_WRITE,
        LAYER_BOUNDARY,
        LAYER_NORM,
        LINEAR,
        PAGED_ATTENTION,
        QKV_ROPE_CACHE,
        RMS_NORM,
        SILU_MUL,
    )
}

__all__ = [*(name.upper() for name in OPS), "OPS", "OwnOp", "Tolerance"]
