"""AMD GPUs with matrix cores for bf16: MI200 (gfx90a), MI300 (gfx942), MI350 (gfx950).  Compiling needs no GPU.

Sources: AMD's data sheets of Instinct MI250X, MI300X and MI355X (compute units, memory, peaks), the white papers of
CDNA 2, 3 and 4 (caches, LDS), and LLVM's "User Guide for AMDGPU Backend" (registers, waves).  A figure is of what
one HIP device is: half an MI250X, a whole MI300X or MI355X.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_compile.errors import TargetError

from .base import Target

NAME = "rocm"
DEFAULT_ARCH = "gfx942"
WAVE = 64  # threads that run in lockstep
MOST_THREADS = 256  # of a thread block: what TVM lets the back end assume

REGISTERS = 512  # 32-bit vector registers that the waves of a SIMD share, per lane; one wave can have them all
REGISTER_GRANULE = 8  # registers are handed out so many at a time
MOST_WAVES = 8  # of a SIMD
SIMDS = 4  # of a compute unit


@dataclass(frozen=True)
class RocmTarget(Target):
    """A GPU: a `Target` whose vector is a wave and whose caches are a compute unit's and the chip's.

    Attributes:
        arch: machine code that LLVM makes.
        compute_units: of the whole device.
        lds_bytes: local data share (shared memory) of a compute unit.
        bandwidth: peak of the device's memory, bytes a second.
        matrix_flops: dense bf16 peak, operations a second.
    """

    arch: str
    compute_units: int
    lds_bytes: int
    bandwidth: float
    matrix_flops: float

    def waves(self, registers: int, lds_bytes: int, threads: int) -> int:
        """Waves of a SIMD that are resident at once, of a kernel that needs so much a thread and a thread block."""
        by_registers = REGISTERS // max(-(-registers // REGISTER_GRANULE) * REGISTER_GRANULE, REGISTER_GRANULE)
        block_waves = -(-threads // WAVE)
        blocks = self.lds_bytes // lds_bytes if lds_bytes else MOST_WAVES * SIMDS
        return min(MOST_WAVES, by_registers, blocks * block_waves // SIMDS)


def _target(
    arch: str, compute_units: int, l1_bytes: int, l2_bytes: int, lds_bytes: int, bandwidth: float, matrix_flops: float
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
        arch=arch,
        compute_units=compute_units,
        lds_bytes=lds_bytes,
        bandwidth=bandwidth,
        matrix_flops=matrix_flops,
    )


# L2 is that of one accelerator die (XCD), of which gfx942 and gfx950 have eight.
ARCHS = {
    target.arch: target
    for target in (
        _target("gfx90a", 110, 16 << 10, 8 << 20, 64 << 10, 1.6e12, 191.5e12),
        _target("gfx942", 304, 32 << 10, 4 << 20, 64 << 10, 5.3e12, 1307.4e12),
        _target("gfx950", 256, 32 << 10, 4 << 20, 160 << 10, 8.0e12, 2516.6e12),
    )
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
