"""One file per target: limits, instruction sets, tile sizes.  Imports neither TVM nor torch."""

from collections.abc import Callable
from functools import partial

from vllm_compile.errors import TargetError

from . import cpu, cuda, rocm
from .base import Target

DETECT: dict[str, Callable[[], Target]] = {
    "cpu": cpu.detect,
    cuda.NAME: cuda.detect,
    rocm.NAME: rocm.for_arch,
    **{arch: partial(rocm.for_arch, arch) for arch in rocm.ARCHS},
}


def resolve(name: str) -> Target:
    """The target called `name`, with the facts of this machine.

    Raises:
        TargetError: no such target, or this machine is none.
    """
    if name not in DETECT:
        raise TargetError(f"unknown target {name!r}; this version has: {', '.join(sorted(DETECT))}")
    return DETECT[name]()


__all__ = ["Target", "resolve"]
