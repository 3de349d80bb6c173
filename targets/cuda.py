"""NVIDIA GPUs of the Hopper generation (H100, H200): sm_90a.  Compiling for them needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_compile.errors import TargetError

from .base import Target
from .chip import Chip

NAME = "cuda"
ARCH = "sm_90a"
CAPABILITY = (9, 0)
MIN_DRIVER = (580, 0)  # of CUDA 13.0, which the kernels are compiled with

# Launches: of the linear layers at 1 token in benchmarks/baseline.md, the median of time - bytes / sustained bandwidth.
H200 = Chip(
    name="NVIDIA H200",
    memory_bytes=141 * 10**9,
    cache_bytes=50 << 20,
    bandwidth=4.8e12,
    matrix={"bfloat16": 989.4e12, "float32": 66.9e12},  # float32 products run on the vector units
    vector=66.9e12,
    sustained_bandwidth=4.5e12,
    sustained_matrix={"bfloat16": 785e12, "float32": 66.9e12},
    launch=2.9e-6,
    vendor_launch=5.6e-6,
    sources=(
        "peaks: NVIDIA H200 data sheet (SXM, dense products)",
        "sustained: reads of lm_head 128256 x 4096, and an 8192 x 8192 x 8192 bf16 product, both seen on an H200",
        "launches: benchmarks/baseline.md, linear layers on an H200 at 1 token, lossless and cuBLAS",
    ),
)
H100 = replace(
    H200,
    name="NVIDIA H100 SXM",
    memory_bytes=80 * 10**9,
    bandwidth=3.35e12,
    sustained_bandwidth=3.0e12,
    launch=1.6e-6,
    vendor_launch=5.5e-6,
    sources=(
        "peaks: NVIDIA H100 data sheet (SXM, dense products)",
        "sustained: reads of lm_head 128256 x 4096 seen on an H100; products as on an H200, which has the same "
        "multiprocessors",
        "launches: benchmarks/baseline.md, linear layers on an H100 at 1 token, lossless and cuBLAS",
    ),
)
RESERVED = 1 << 10  # bytes of a multiprocessor's shared memory that each thread block costs besides its own
CHIPS = {"h200": H200, "h100": H100}
DEFAULT_CHIP = "h200"


@dataclass(frozen=True)
class CudaTarget(Target):
    """A GPU: a `Target` whose vector is a warp and whose caches are a multiprocessor's and the chip's.

    Attributes:
        arch: machine code that nvcc makes.
        chip: of `CHIPS`, for which configurations of kernels are chosen.  They run on the others too.
        multiprocessors: of the whole chip.
        shared_bytes: shared memory that one thread block can have; it is taken from L1.
    """

    arch: str
    chip: str
    multiprocessors: int
    shared_bytes: int

    def shared_bytes_of(self, blocks: int) -> int:
        """Shared memory that each of so many thread blocks on a multiprocessor can have."""
        return (self.shared_bytes + RESERVED) // blocks - RESERVED

    def described(self) -> dict[str, object]:
        return super().described() | {"chip": self.chip}


def for_chip(chip: str = DEFAULT_CHIP) -> CudaTarget:
    """A Hopper GPU, present or not: kernels for it are the same on every machine."""
    return CudaTarget(
        name=NAME,
        tvm=(("kind", "cuda"), ("arch", ARCH), ("max_threads_per_block", 1024), ("thread_warp_size", 32)),
        features=frozenset({ARCH}),
        vector_lanes=32,
        l1_bytes=256 << 10,
        l2_bytes=50 << 20,
        arch=ARCH,
        chip=chip,
        multiprocessors=132,
        shared_bytes=227 << 10,
    )


def chip_of(memory_bytes: int) -> str:
    """Which of `CHIPS` a Hopper GPU is, by the memory of its card."""
    return min(CHIPS, key=lambda name: abs(CHIPS[name].memory_bytes - memory_bytes))


def require(capability: tuple[int, int], driver: tuple[int, int], name: str = "this GPU") -> None:
    """Check that a GPU of this compute capability, under this driver version, can run the kernels.

    Raises:
        TargetError: it cannot.
    """
    if capability != CAPABILITY:
        raise TargetError(
            f"kernels are compiled for {ARCH} (H100, H200), but {name} has compute capability "
            f"{capability[0]}.{capability[1]}; use a Hopper GPU, or compile for another target"
        )
    if driver < MIN_DRIVER:
        raise TargetError(
            f"kernels need an NVIDIA driver of version {MIN_DRIVER[0]} or later, "
            f"but {driver[0]}.{driver[1]} is installed"
        )
