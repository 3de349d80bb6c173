"""Kernel families for NVIDIA GPUs, in order of preference: the first that serves a call is the default."""

from ..family import KernelFamily
from .attention import PagedAttention
from .elementwise import Embedding, SiluMul
from .expression import Elementwise
from .gate_up import GateUpSilu
from .kv_cache_write import KVCacheWrite
from .linear import Linear
from .norm import LayerNorm, RMSNorm
from .rope_attention import QKVRopeAttention
from .rope_cache import QKVRopeCache

FAMILIES: tuple[KernelFamily, ...] = (
    Linear(packed=True),
    Linear(packed=False),
    GateUpSilu(packed=True),
    GateUpSilu(packed=False),
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
)
