"""What a name in an ONNX graph may stand for while it is imported, besides an activation in Relax."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax


@dataclass(frozen=True)
class Weight:
    """An initializer, or its transpose: which of the two becomes a parameter is settled where it is used."""

    name: str
    shape: tuple[int, ...]
    transposed: bool = False

    def flip(self) -> Weight:
        """The transpose of a matrix."""
        return Weight(self.name, self.shape[::-1], not self.transposed)


@dataclass(frozen=True)
class Folded:
    """What ONNX has as [1, T * H, D], heads counted together with tokens; here [1, T, H, D]."""

    rows: relax.Expr


@dataclass(frozen=True)
class Heads:
    """What ONNX has as [1, T, H * D], rotated; here [1, H, T, D], as attention takes it."""

    heads: relax.Expr


@dataclass(frozen=True)
class GraphInput:
    """Ids, positions, a mask or a cache."""

    name: str
