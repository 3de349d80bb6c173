"""Kernel families for CPUs, in order of preference: the first that serves a call is the default."""

from ..family import KernelFamily
from .attention import PagedAttention
from .elementwise import Elementwise
from .embedding import Embedding
from .experts import ExpertGateUpSilu, ExpertLinear
from .gate_up import GateUpSilu
from .head_linear import HeadLinear
from .kv_cache_write import KVCacheWrite
from .layer_norm import LayerNorm
from .linear import Linear
from .norm import AddRMSNorm, RMSNorm
from .rope_cache import QKVRopeCache
from .route import Route

FAMILIES: tuple[KernelFamily, ...] = (
    Linear(packed=True),
    Linear(packed=False),
    GateUpSilu(packed=True),
    GateUpSilu(packed=False),
    HeadLinear(),
    Route(),
    ExpertGateUpSilu(),
    ExpertLinear(),
    RMSNorm(),
    AddRMSNorm(),
    LayerNorm(),
    Embedding(),
    Elementwise(),
    QKVRopeCache(),
    KVCacheWrite(),
    PagedAttention(),
)
