"""What a generated TPC kernel is: its source, and what each piece of its work touches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm_compile.spec import Dim


class At(NamedTuple):
    """A place on an axis: `scale * (place on dimension `dim` of the index space) + offset`, fixed where dim is None."""

    dim: int | None
    scale: int
    offset: int

    def text(self) -> str:
        if self.dim is None:
            return str(self.offset)
        scaled = f"i{self.dim}" if self.scale == 1 else f"{self.scale} * i{self.dim}"
        return f"{scaled} + {self.offset}" if self.offset else scaled


@dataclass(frozen=True)
class Access:
    """What a piece of work at i touches on each TPC dimension of a tensor: from a * i + start to a * i + end."""

    name: str
    shape: tuple[Dim, ...]
    spans: tuple[tuple[int, int, int, int], ...]  # (dimension of the index space, a, start, end)


@dataclass(frozen=True)
class Kernel:
    """A kernel: `body` is its source behind the includes.

    Attributes:
        geometry: places on each dimension of the index space; `Sym.TOKENS` where there is one a token.
    """

    dtype: str
    body: str
    inputs: tuple[Access, ...]
    outputs: tuple[Access, ...]
    geometry: tuple[Dim, ...]

    @property
    def tensors(self) -> tuple[Access, ...]:
        return (*self.inputs, *self.outputs)
