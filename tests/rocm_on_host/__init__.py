"""Runs the host and device code of ROCm kernels on a machine without an AMD GPU."""

import os

import pytest

from vllm_compile.errors import TargetError
from vllm_compile.toolchain import find_lld

from .opencl import available


def _has_lld() -> bool:
    try:
        return bool(find_lld())
    except TargetError:
        return False


REQUIRED = "REQUIRE_ROCM_TOOLS" in os.environ
needs_lld = pytest.mark.skipif(not REQUIRED and not _has_lld(), reason="needs an ld.lld for AMD GPUs")
needs_opencl = pytest.mark.skipif(not REQUIRED and not (_has_lld() and available()), reason="needs PoCL and libOpenCL")
