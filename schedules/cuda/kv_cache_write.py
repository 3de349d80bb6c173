"""Writes k and v into the paged KV cache, for models whose rotary embedding is not fused with it.

Bytes: T * KH * (D + DV) * 4, read once and written once; no arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets.cuda import CudaTarget

from ..family import Config, KernelFamily
from .launch import Launch, kernel
from .norm import VECTOR

MOST_THREADS = 256


@dataclass(frozen=True)
class KVCacheWrite(KernelFamily):
    """`kv_cache_write` of bf16 heads whose keys and values are multiples of 8 wide."""

    name: str = "cuda.kv_cache_write"
    op: str = "kv_cache_write"

    def serves(self, spec: OpSpec, target: CudaTarget) -> bool:
        rows = [spec.input(name) for name in ("k", "v") if spec.has_input(name)]
        return all(row.dtype == "bfloat16" and row.size(2) % VECTOR == 0 for row in rows)

    def build(self, spec: OpSpec, config: Config, target: CudaTarget) -> tirx.PrimFunc:
        _, kv_heads, key = spec.input("k").sizes()
        value = spec.input("v").size(2) if spec.has_input("v") else 0
        threads = min(-(-kv_heads * (key + value) // VECTOR // 32) * 32, MOST_THREADS)
        return kernel(
            spec,
            "kv_cache_write.cuh",
            f"kv_cache_write<{kv_heads}, {key}, {value}, {threads}>",
            lambda call: Launch([call.dims[Sym.TOKENS]], threads),
            lambda call: [
                *map(call.data, ("k", "v", "kv", "slot_mapping")),
                call.dims[Sym.BLOCK_SIZE],
                *call.strides("kv"),
            ],
        )
