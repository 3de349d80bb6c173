"""The C compiler that links the compiled kernels."""

from __future__ import annotations

import subprocess

from vllm_compile.errors import TargetError
from vllm_compile.toolchain import environment, find_gcc


def gcc(*arguments: str) -> None:
    """Run gcc.

    Raises:
        TargetError: it is missing, or fails.
    """
    try:
        subprocess.run([find_gcc(), *arguments], check=True, capture_output=True, text=True, env=environment())
    except subprocess.CalledProcessError as error:
        raise TargetError(f"gcc failed: {error.stderr.strip()}") from error
