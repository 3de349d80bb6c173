"""Kernel families for NVIDIA GPUs, in order of preference: the first that serves a call is the default."""

from ..family import KernelFamily
from .gate_up import GateUpSilu
from .linear import Linear

FAMILIES: tuple[KernelFamily, ...] = (
    Linear(packed=True),
    Linear(packed=False),
    GateUpSilu(packed=True),
    GateUpSilu(packed=False),
)
