"""NVIDIA GPUs of the Hopper generation (H100, H200): sm_90a.  Compiling for them needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_compile.errors import TargetError

from .base import Target

NAME = "cuda"
ARCH = "sm_90a"
CAPABILITY = (9, 0)
MIN_DRIVER = (580, 0)  # of CUDA 13.0, which the kernels are compiled with


@dataclass(frozen=True)
class CudaTarget(Target):
    """A GPU: a `Target` whose vector is a warp and whose caches are a multiprocessor's and the chip's.

    Attributes:
        arch: machine code that nvcc makes.
        multiprocessors: of the whole chip.
        shared_bytes: shared memory that one thread block can have; it is taken from L1.
    """

    arch: str
    multiprocessors: int
    shared_bytes: int


def detect() -> CudaTarget:
    """The Hopper GPU, present or not: kernels for it are the same on every machine."""
    return CudaTarget(
        name=NAME,
        tvm=(("kind", "cuda"), ("arch", ARCH), ("max_threads_per_block", 1024), ("thread_warp_size", 32)),
        features=frozenset({ARCH}),
        vector_lanes=32,
        l1_bytes=256 << 10,
        l2_bytes=50 << 20,
        arch=ARCH,
        multiprocessors=132,
        shared_bytes=227 << 10,
    )


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
