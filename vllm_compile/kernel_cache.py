"""Libraries of compiled kernels, shared by all models whose kernels are the same.

The unit is the library, not the kernel: nvcc takes 3.7 s of a core for the smallest kernel and 8 s for all 21 of
Llama-3.1-70B at once, because it mostly reads headers, so kernels compiled one by one would take five times as long.
The key says nothing of a model: its depth, weights and names are not in it.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cache import Cache, key_of
from .lowering import Lowered
from .spec import OpSpec
from .targets import Target
from .toolchain import kernel_toolchain

KIND = "kernels"


def library_facts(lowered: Lowered, target: Target) -> dict[str, Any]:
    """All that the library of a model's kernels is made from.

    Raises:
        TargetError: a compiler that the target needs is missing.
    """
    kernels = [
        {"symbol": symbol, "call": _plain(call.spec), "family": call.choice.family.name, "config": dict(variant.config)}
        for call in lowered.kernels.values()
        for symbol, variant in call.distinct().items()
    ]
    return {"kernels": sorted(kernels, key=lambda kernel: kernel["symbol"]), "toolchain": kernel_toolchain(target)}


class KernelCache:
    """The entry in `cache` for the library of one model's kernels."""

    def __init__(self, cache: Cache, lowered: Lowered, target: Target) -> None:
        facts = library_facts(lowered, target)
        self._cache, self._key = cache, key_of(facts)
        ops = sorted({call.spec.op for call in lowered.kernels.values()})
        self._about = f"{len(facts['kernels'])} kernels for {target.name}: {', '.join(ops)}"

    def restore(self, library: Path) -> bool:
        """Write the library, if it is known."""
        content = self._cache.get(KIND, self._key)
        if content is None:
            return False
        library.write_bytes(content)
        return True

    def keep(self, library: Path) -> None:
        """Remember a library that has been built."""
        self._cache.put(KIND, self._key, self._about, library.read_bytes())


def _plain(spec: OpSpec) -> dict[str, Any]:
    return {**asdict(spec), "options": sorted(spec.options)}
