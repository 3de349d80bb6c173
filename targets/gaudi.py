"""Intel Gaudi 2 and 3: graphs of static shapes; matrix products on their MMEs, all else on vector cores (TPCs).

Sources: "Intel Gaudi 3 AI Accelerator: Architected for Gen AI Training and Inference" (Hot Chips 2024: memory, its
bandwidth and BF16 peaks of both; TPCs, SRAM and vector peak of Gaudi 3), Intel's article "The Habana Gaudi2 Processor
for Deep Learning" (TPCs, memory) and Habana's announcement of May 2022 (SRAM of Gaudi 2), and Intel Gaudi's
documentation, "TPC User Guide" (vectors of 2,048 bits) and sample kernels (80 KiB of vector memory a TPC).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from .base import Target
from .chip import GUESSED, GUESSED_PRODUCTS, H200_LAUNCH, H200_SHARE_OF_PRODUCTS, H200_SHARE_OF_READS, Chip

VECTOR_BITS = 2048
VECTOR_MEMORY = 80 << 10  # of a TPC


@dataclass(frozen=True)
class GaudiTarget(Target):
    """A Gaudi: a `Target` whose vector is a TPC's and whose caches are a TPC's vector memory and the chip's SRAM.

    Attributes:
        tpcs: vector cores.
    """

    tpcs: int


def _target(name: str, tpcs: int, sram_bytes: int) -> GaudiTarget:
    return GaudiTarget(
        name=name,
        tvm=(),  # TVM has no back end for it
        features=frozenset({name}),
        vector_lanes=VECTOR_BITS // 32,
        l1_bytes=VECTOR_MEMORY,
        l2_bytes=sram_bytes,
        tpcs=tpcs,
    )


TARGETS = {target.name: target for target in (_target("gaudi2", 24, 48 << 20), _target("gaudi3", 64, 96 << 20))}
DETECT = {name: partial(TARGETS.__getitem__, name) for name in TARGETS}


def _vector_flops(tpcs: int) -> float:
    """float32 FLOP/s of vectors: Gaudi 3's 64 TPCs do 28.7e12 in BF16, on twice the lanes."""
    return 28.7e12 / 2 * tpcs / 64


GAUDI2 = Chip(
    name="Intel Gaudi 2",
    memory_bytes=96 * 10**9,
    cache_bytes=48 << 20,
    bandwidth=2.46e12,
    matrix={"bfloat16": 432e12, "float32": _vector_flops(24)},
    vector=_vector_flops(24),
    sustained_bandwidth=H200_SHARE_OF_READS * 2.46e12,
    sustained_matrix={"bfloat16": 0.994 * 432e12, "float32": _vector_flops(24)},
    launch=H200_LAUNCH,
    vendor_launch=None,
    sources=(
        "peaks: Hot Chips 2024 (432 TFLOP/s in BF16, 2.46 TB/s, 96 GB); vectors: Gaudi 3's, by the number of TPCs; "
        "float32 products are counted as vector work",
        "sustained products: 99.4 % of the peak, published in the table of maximum achievable products of the book "
        "Machine Learning Engineering (S. Bekman), measured by Intel",
        GUESSED,
    ),
)
GAUDI3 = Chip(
    name="Intel Gaudi 3",
    memory_bytes=128 * 10**9,
    cache_bytes=96 << 20,
    bandwidth=3.67e12,
    matrix={"bfloat16": 1835e12, "float32": _vector_flops(64)},
    vector=_vector_flops(64),
    sustained_bandwidth=H200_SHARE_OF_READS * 3.67e12,
    sustained_matrix={"bfloat16": H200_SHARE_OF_PRODUCTS * 1835e12, "float32": _vector_flops(64)},
    launch=H200_LAUNCH,
    vendor_launch=None,
    sources=(
        "peaks: Hot Chips 2024 (1,835 TFLOP/s in BF16, 28.7 TFLOP/s of BF16 vectors, 3.67 TB/s, 128 GB); float32 has "
        "half as many lanes, and its products are counted as vector work",
        GUESSED_PRODUCTS,
        GUESSED,
    ),
)
CHIPS = {"gaudi2": {"gaudi2": GAUDI2}, "gaudi3": {"gaudi3": GAUDI3}}
