"""Rotary embedding and KV cache write: a thread block a token, 32 bytes a thread.

Bytes: T * (H + 2 * KH) * D * 4, read once and written once; 6 operations a rotated value.  One token of Llama-3.1-8B
is 24 KB: latency alone; 8,192 tokens are 201 MB, 42 us at 4.8 TB/s.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily
from .launch import Launch, kernel
from .norm import VECTOR

MOST_THREADS = 512


@dataclass(frozen=True)
class QKVRopeCache(KernelFamily):
    """`qkv_rope_cache` of bf16 heads whose size is a multiple of 16."""

    name: str = "cuda.qkv_rope_cache"
    op: str = "qkv_rope_cache"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        return spec.input("qkv").dtype == "bfloat16" and spec.attribute("head_dim") % (2 * VECTOR) == 0

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        heads, kv_heads, head_dim = (spec.attribute(n) for n in ("num_heads", "num_kv_heads", "head_dim"))
        items = (heads + 2 * kv_heads) * head_dim // (2 * VECTOR)
        threads = min(-(-items // 32) * 32, MOST_THREADS)
        return kernel(
            spec,
            "rope_cache.cuh",
            f"rope_cache<{heads}, {kv_heads}, {head_dim}, {threads}>",
            lambda call: Launch([call.dims[Sym.TOKENS]], threads),
            lambda call: [
                *map(call.data, ("qkv", "cos", "sin", "kv", "slot_mapping", "out")),
                call.dims[Sym.BLOCK_SIZE],
                *call.strides("kv"),
            ],
        )
