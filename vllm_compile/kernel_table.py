"""The kernels of a model: those of each distinct call, and what they are called in the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .schedules.family import Variant
from .schedules.select import Choice
from .spec import OpSpec


@dataclass(frozen=True)
class Kernels:
    """The kernels of one call: for each variant of the family chosen, the symbol that serves it."""

    spec: OpSpec
    choice: Choice
    symbols: tuple[str, ...]

    def distinct(self) -> dict[str, Variant]:
        """Each kernel to be built, with the first variant that it serves."""
        return {symbol: v for v, symbol in reversed(list(zip(self.choice.variants, self.symbols, strict=True)))}


class KernelTable:
    """Kernels by call, chosen when a call is first met.

    Attributes:
        known: those of the calls met so far.
    """

    def __init__(self, choose: Callable[[OpSpec], Choice]) -> None:
        self._choose = choose
        self.known: dict[OpSpec, Kernels] = {}

    def of(self, spec: OpSpec) -> Kernels:
        """The kernels of a call."""
        if spec not in self.known:
            choice = self._choose(spec)
            number = sum(known.op == spec.op for known in self.known)
            # Variants of one configuration are one kernel, named after the first of them.
            first: dict[frozenset, int] = {}
            for variant in choice.variants:
                first.setdefault(frozenset(variant.config.items()), variant.min_tokens)
            minimums = (first[frozenset(variant.config.items())] for variant in choice.variants)
            symbols = tuple(f"{spec.op}_{number}_t{minimum}" for minimum in minimums)
            self.known[spec] = Kernels(spec, choice, symbols)
        return self.known[spec]
