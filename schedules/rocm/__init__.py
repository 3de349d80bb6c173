"""Kernel families for AMD GPUs, in order of preference: the first that serves a call is the default."""

from ..family import KernelFamily
from .attention import PagedAttention
from .elementwise import Embedding, SiluMul
from .linear import GateUpSilu, Linear
from .norm import RMSNorm
from .rope_cache import QKVRopeCache

FAMILIES: tuple[KernelFamily, ...] = (
    Linear(packed=True),
    Linear(),
    GateUpSilu(packed=True),
    GateUpSilu(),
    RMSNorm(),
    RMSNorm(add=True),
    Embedding(),
    SiluMul(),
    QKVRopeCache(),
    PagedAttention(),
)
