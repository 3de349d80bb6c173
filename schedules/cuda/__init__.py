"""Kernel families for NVIDIA GPUs, in order of preference: the first that serves a call is the default."""

from ..family import KernelFamily
from .argmax import Argmax
from .attention import PagedAttention
from .elementwise import Embedding, SiluMul
from .experts import ExpertGateUpSilu, ExpertLinear
from .expression import Elementwise
from .gate_up import GateUpSilu
from .kv_cache_write import KVCacheWrite
from .linear import Linear
from .norm import LayerNorm, RMSNorm
from .prefill_attention import PrefillAttention
from .rope_attention import QKVRopeAttention
from .rope_cache import QKVRopeCache
from .route import Route, RowLinear

FAMILIES: tuple[KernelFamily, ...] = (
    Linear(packed=True),
    Linear(packed=False),
    RowLinear(),
    GateUpSilu(packed=True),
    GateUpSilu(packed=False),
    Route(),
    ExpertGateUpSilu(),
    ExpertLinear(),
    RMSNorm(),
    RMSNorm(add=True),
    LayerNorm(),
    Embedding(),
    SiluMul(),
    Elementwise(),
    QKVRopeAttention(),
    QKVRopeCache(),
    KVCacheWrite(),
    PagedAttention(),
    PrefillAttention(),
    Argmax(),
)
