"""Kernel families for Intel Gaudi: a program of torch functions, with fused kernels for its vector cores."""

from .families import FAMILIES

__all__ = ["FAMILIES"]
