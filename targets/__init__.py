"""One file per target: limits, instruction sets, tile sizes.  Imports neither TVM nor torch."""

from collections.abc import Callable, Mapping
from functools import partial

from vllm_compile.errors import TargetError

from . import cpu, cuda, gaudi, rocm
from .base import Target
from .chip import Chip

DETECT: dict[str, Callable[[], Target]] = {
    "cpu": cpu.detect,
    cuda.NAME: cuda.for_chip,
    **{chip: partial(cuda.for_chip, chip) for chip in cuda.CHIPS},
    rocm.NAME: rocm.for_arch,
    **{arch: partial(rocm.for_arch, arch) for arch in rocm.ARCHS},
    **gaudi.DETECT,
}
# Chips of each target by `Target.resolved_by`, the default first; a CPU's peaks are measured where it stands
# (`analysis/probe.py`).
CHIPS: dict[str, Mapping[str, Chip]] = {"cpu": {}, cuda.NAME: cuda.CHIPS, **rocm.CHIPS, **gaudi.CHIPS}


def resolve(name: str) -> Target:
    """The target called `name`, with the facts of this machine.

    Raises:
        TargetError: no such target, or this machine is none.
    """
    if name not in DETECT:
        raise TargetError(f"unknown target {name!r}; this version has: {', '.join(sorted(DETECT))}")
    return DETECT[name]()


__all__ = ["CHIPS", "Chip", "Target", "resolve"]
