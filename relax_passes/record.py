"""What is recorded of a pass.  Imports no TVM."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PassRecord:
    """A pass that ran, and how often it matched."""

    name: str
    matches: int
