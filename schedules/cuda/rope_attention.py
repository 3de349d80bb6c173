"""Rotary embedding, KV cache write and decode attention in one kernel: nothing else lies between two projections.

Bytes: those of attention (attention.py) and T * (H + 2 * KH) * D * 2 of queries, keys and values, once.  What is saved
is not bytes but a launch and a wait: 2.2 us a layer on an H200 for the rotation by itself, and tiles of the cache are
all requested while the projection before still runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx

from vllm_compile.fused_calls import parts
from vllm_compile.spec import OpSpec
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily, Prologue, Variant, Vendor
from .attention import PagedAttention, attention_kernel, default_variants, prefill
from .launch import VECTOR_BYTES
from .rope_cache import QKVRopeCache

ROTATION, ATTENTION = QKVRopeCache(), PagedAttention()


@dataclass(frozen=True)
class QKVRopeAttention(KernelFamily):
    """`qkv_rope_attention` where `qkv_rope_cache` and `paged_attention` have kernels."""

    name: str = "cuda.qkv_rope_attention"
    op: str = "qkv_rope_attention"

    @property
    def options(self) -> frozenset[str]:
        return ATTENTION.options

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        rotation, attention = parts(spec)
        return ROTATION.serves(rotation, target) and ATTENTION.serves(attention, target)

    def variants(self, spec: OpSpec, target: CudaTarget) -> Sequence[Variant]:
        return default_variants(parts(spec)[1], target)

    def vendor(self, spec: OpSpec, target: CudaTarget) -> Vendor:
        """Prompts' attention behind rotation and cache write by themselves."""
        rotation, attention = parts(spec)
        return prefill(attention, Prologue(rotation, attention))

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        tokens, attention = ("qkv", "cos", "sin", "kv", "slot_mapping"), parts(spec)[1]
        q, kv = attention.input("q"), attention.input("kv")
        turned = (q.size(1) // kv.size(1) + 2) * (2 * q.size(2) + VECTOR_BYTES)
        return attention_kernel(spec, attention, "rope_attention", tokens, config, target, turned)
