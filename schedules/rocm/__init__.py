"""Kernel families for AMD GPUs, in order of preference: the first that serves a call is the default."""

from ..family import KernelFamily
from .attention import PagedAttention
from .elementwise import Embedding, SiluMul
from .experts import ExpertGateUpSilu, ExpertLinear
from .expression import Elementwise
from .linear import GateUpSilu, Linear
from .norm import RMSNorm
from .rope_cache import QKVRopeCache
from .route import Route

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
    Route(),
    ExpertGateUpSilu(),
    ExpertLinear(),
    Elementwise(),
)
