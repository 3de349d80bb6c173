"""The three instruction levels of x86-64 that kernels are written for, as far as this machine runs them."""

import pytest

from vllm_compile.targets import cpu, resolve

# Code for any level can be built anywhere.
LEVELS = {
    "avx2": cpu.for_features(cpu.AVX2),
    "avx512": cpu.for_features(cpu.AVX2 | cpu.AVX512),
    "avx512_bf16": cpu.for_features(cpu.AVX2 | cpu.AVX512 | {cpu.AVX512_BF16}),
}
# Parameters for pytest.mark.parametrize("target", TARGETS).
TARGETS = [
    pytest.param(
        target,
        id=name,
        marks=pytest.mark.skipif(not cpu.host_features() >= target.features, reason=f"this CPU has no {name}"),
    )
    for name, target in LEVELS.items()
]
HOST = resolve("cpu")
