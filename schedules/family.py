"""What a kernel family is: one way to compute an operator on some targets.

A family is one file.  It says which calls it serves, how it wants the weights laid out,
which variants exist for which numbers of tokens, and builds a PrimFunc for each.  To add
one, write the file and list it in the target's table of families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tvm import tirx

from vllm_compile.spec import OpSpec
from vllm_compile.targets import Target

from .layouts import Layout

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """A kernel that serves calls of at least `min_tokens` tokens (up to the next variant's)."""

    min_tokens: int
    config: Config = field(default_factory=dict)


class KernelFamily(Protocol):
    """One way to compute `op`."""

    @property
    def name(self) -> str:
        """What records call it: `target.family`."""

    @property
    def op(self) -> str:
        """The operator it computes."""

    def serves(self, spec: OpSpec, target: Target) -> bool:
        """True if `build` can make a kernel for this call on this target."""

    def layouts(self, spec: OpSpec, target: Target) -> Mapping[str, Layout]:
        """The layout in which the kernel reads each weight input; a weight not named stays as it is.

        `spec` is the call with plain weights.
        """

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        """The default choice by number of tokens, ascending; the first has min_tokens 1."""

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        """The kernel, called as `kernel(*inputs, *outputs)`; `spec` is the call with plain weights."""
