"""AMD GPUs with matrix cores for bf16: MI200 (gfx90a), MI300 (gfx942), MI350 (gfx950).  Compiling needs no GPU.

Sources: AMD's data sheets of Instinct MI250X, MI300X and MI355X (compute units, memory, peaks), the white papers of
CDNA 2, 3 and 4 (caches, LDS, bytes a clock), AMD's ROCm Compute Profiler (peak of L1), LLVM's "User Guide for AMDGPU
Backend" (registers, waves), and LLVM 22's scheduling model (passes of matrix instructions).  A figure is of what one
HIP device is: half an MI250X, a whole MI300X or MI355X.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_compile.errors import TargetError

from .base import Target
from .chip import (
    GUESSED,
    GUESSED_PRODUCTS,
    H200_LAUNCH,
    H200_SHARE_OF_PRODUCTS,
    H200_SHARE_OF_READS,
    H200_VENDOR_LAUNCH,
    Chip,
)

NAME = "rocm"
DEFAULT_ARCH = "gfx942"
WAVE = 64  # threads that run in lockstep
MOST_THREADS = 256  # of a thread block: what TVM lets the back end assume

REGISTERS = 512  # 32-bit vector registers that the waves of a SIMD share, per lane; one wave can have them all
REGISTER_GRANULE = 8  # registers are handed out so many at a time
MOST_WAVES = 8  # of a SIMD
SIMDS = 4  # of a compute unit
LDS_CLOCK_BYTES = 128  # that a compute unit loads from LDS in a clock; of gfx950 taken to be gfx942's
ISSUE_CLOCKS = 4  # that a SIMD of 16 lanes takes for a vector instruction of a wave


@dataclass(frozen=True)
class RocmTarget(Target):
    """A GPU: a `Target` whose vector is a wave and whose caches are a compute unit's and the chip's.

    Attributes:
        device: what AMD calls the chip.
        arch: machine code that LLVM makes.
        compute_units: of the whole device.
        lds_bytes: local data share (shared memory) of a compute unit.
        bandwidth: peak of the device's memory, bytes a second.
        matrix_flops: dense bf16 peak, operations a second.
        clock: peak, 1/s.
        l1_clock_bytes: that a compute unit loads through L1 in a clock.
        l2_clock_bytes: that all of L2 gives in a clock: 128 a channel.
        mfma_clocks: that V_MFMA_F32_16X16X16_BF16 occupies a SIMD's matrix core.
    """

    device: str
    arch: str
    compute_units: int
    lds_bytes: int
    bandwidth: float
    matrix_flops: float
    clock: float
    l1_clock_bytes: int
    l2_clock_bytes: int
    mfma_clocks: int

    @property
    def resolved_by(self) -> str:
        return self.arch

    def waves(self, registers: int, lds_bytes: int, threads: int) -> int:
        """Waves of a SIMD that are resident at once, of a kernel that needs so much a thread and a thread block."""
        block_waves = -(-threads // WAVE)
        blocks = self.lds_bytes // lds_bytes if lds_bytes else MOST_WAVES * SIMDS
        return min(_waves_of(registers), blocks * block_waves // SIMDS)

    def blocks(self, registers: int, lds_bytes: int, waves: int) -> int:
        """Thread blocks of so many waves that a compute unit holds at once."""
        by_waves = SIMDS * _waves_of(registers) // waves
        return min(by_waves, self.lds_bytes // lds_bytes) if lds_bytes else by_waves


def _waves_of(registers: int) -> int:
    """Waves that the registers of a SIMD are enough for."""
    granules = max(-(-registers // REGISTER_GRANULE), 1)
    return min(MOST_WAVES, REGISTERS // (granules * REGISTER_GRANULE))


def _target(
    model: str,
    arch: str,
    compute_units: int,
    l1_bytes: int,
    l2_bytes: int,
    lds_bytes: int,
    bandwidth: float,
    matrix_flops: float,
    clock: float,
    l1_clock_bytes: int,
    l2_clock_bytes: int,
    mfma_clocks: int,
) -> RocmTarget:
    return RocmTarget(
        name=NAME,
        tvm=(
            ("kind", "rocm"),
            ("mcpu", arch),
            ("mtriple", "amdgcn-amd-amdhsa-hcc"),
            ("thread_warp_size", WAVE),
            ("max_num_threads", MOST_THREADS),
            ("max_threads_per_block", MOST_THREADS),
            ("max_shared_memory_per_block", lds_bytes),
        ),
        features=frozenset({arch}),
        vector_lanes=WAVE,
        l1_bytes=l1_bytes,
        l2_bytes=l2_bytes,
        device=f"AMD Instinct {model}",
        arch=arch,
        compute_units=compute_units,
        lds_bytes=lds_bytes,
        bandwidth=bandwidth,
        matrix_flops=matrix_flops,
        clock=clock,
        l1_clock_bytes=l1_clock_bytes,
        l2_clock_bytes=l2_clock_bytes,
        mfma_clocks=mfma_clocks,
    )


# L2 is that of one accelerator die (XCD), of which gfx942 and gfx950 have eight.  Its bytes a clock on gfx950 are taken
# to be those of gfx942.
ARCHS = {
    target.arch: target
    for target in (
        _target("MI250X", "gfx90a", 110, 16 << 10, 8 << 20, 64 << 10, 1.6e12, 191.5e12, 1.7e9, 64, 32 * 128, 32),
        _target("MI300X", "gfx942", 304, 32 << 10, 4 << 20, 64 << 10, 5.3e12, 1307.4e12, 2.1e9, 128, 128 * 128, 16),
        _target("MI355X", "gfx950", 256, 32 << 10, 4 << 20, 160 << 10, 8.0e12, 2516.6e12, 2.4e9, 128, 128 * 128, 16),
    )
}


def _chip(arch: str, memory_bytes: int, cache_bytes: int, vector: float, matrix_float32: float, sheet: str) -> Chip:
    """The chip of a target, whose bf16 peak and bandwidth it has; no AMD GPU was measured."""
    target = ARCHS[arch]
    return Chip(
        name=target.device,
        memory_bytes=memory_bytes,
        cache_bytes=cache_bytes,
        bandwidth=target.bandwidth,
        matrix={"bfloat16": target.matrix_flops, "float32": matrix_float32},
        vector=vector,
        sustained_bandwidth=H200_SHARE_OF_READS * target.bandwidth,
        sustained_matrix={
            "bfloat16": H200_SHARE_OF_PRODUCTS * target.matrix_flops,
            "float32": H200_SHARE_OF_PRODUCTS * matrix_float32,
        },
        launch=H200_LAUNCH,
        vendor_launch=H200_VENDOR_LAUNCH,
        sources=(f"peaks: {sheet}", GUESSED_PRODUCTS, f"{GUESSED}, 5.1 us of a library's kernel"),
    )


# The cache that all compute units share: L2 of a die of an MI250X, the Infinity Cache of the others.
CHIPS = {
    "gfx942": {
        "mi300x": _chip("gfx942", 192 * 10**9, 256 << 20, 163.4e12, 163.4e12, "AMD Instinct MI300X data sheet"),
    },
    "gfx90a": {
        "mi250x": _chip(
            "gfx90a",
            64 * 10**9,
            8 << 20,
            23.9e12,
            47.9e12,
            "AMD Instinct MI250X data sheet, halved: a HIP device is one of its two dies",
        ),
    },
    "gfx950": {
        "mi355x": _chip("gfx950", 288 * 10**9, 256 << 20, 157.3e12, 157.3e12, "AMD Instinct MI355X data sheet"),
    },
}


def for_arch(arch: str = DEFAULT_ARCH) -> RocmTarget:
    """The GPU called `arch`, present or not: kernels for it are the same on every machine.

    Raises:
        TargetError: kernels are not written for it.
    """
    if arch not in ARCHS:
        raise TargetError(f"no AMD GPU {arch!r}; kernels are written for {', '.join(ARCHS)}")
    return ARCHS[arch]


def require(arch: str, compiled: str) -> None:
    """Check that a GPU called `arch` can run kernels compiled for `compiled`.

    Raises:
        TargetError: it cannot.
    """
    if arch != compiled:
        raise TargetError(
            f"kernels are compiled for {compiled}, but this GPU is {arch}; compile the model again for it"
        )
