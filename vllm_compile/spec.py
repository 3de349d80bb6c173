"""Shapes and operator signatures as plain data: the words that compiler and runtime share.

Nothing here imports TVM or torch.  A dimension is either known when the model is
compiled (an int) or bound at each call (a `Sym`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any


class Sym(StrEnum):
    """Dimensions that are bound at each call of the compiled program."""

    TOKENS = "T"  # tokens in the batch, prefill and decode together
    REQUESTS = "R"  # rows of the block table
    BOUNDARIES = "R1"  # rows of the block table plus one (query_start_loc)
    TABLE_WIDTH = "W"  # columns of the block table
    BLOCKS = "B"  # blocks in the paged KV cache
    BLOCK_SIZE = "N"  # tokens in one block


Dim = int | Sym

DUMMY_STD = 0.02  # of weights made at random: what transformers initialises with by default

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "int32": 4, "int64": 8, "uint8": 1}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor argument.

    `shape` is row-major and contiguous unless `strided`, in which case only the last
    axis is (the paged KV cache, whose outer strides are the serving engine's choice).
    """

    shape: tuple[Dim, ...]
    dtype: str
    strided: bool = False

    def sizes(self, tokens: int = 0) -> list[int]:
        """The shape for `tokens` tokens; the other symbols must not occur in it."""
        return [tokens if dim == Sym.TOKENS else int(dim) for dim in self.shape]

    def size(self, axis: int) -> int:
        """Extent of an axis that is known when the model is compiled; TypeError if it is not."""
        extent = self.shape[axis]
        if isinstance(extent, Sym):
            raise TypeError(f"axis {axis} of {self.shape} is bound at each call")
        return extent

    def nbytes(self, tokens: int = 0) -> int:
        """Size in bytes for `tokens` tokens, if contiguous."""
        return DTYPE_BYTES[self.dtype] * prod(self.sizes(tokens))


@dataclass(frozen=True)
class OpSpec:
    """One call of an operator: everything a kernel is chosen and built by, and nothing else.

    `inputs` holds (argument name, tensor) pairs in calling order; leading batch axes are
    already merged, so activations are [T, K].  `outputs` are the tensors the kernel writes;
    an input that is updated in place (the KV cache) is not repeated there.
    A kernel for it is called as `kernel(*inputs, *outputs)`.  `options` names those attributes that
    calls of the operator may leave out.
    """

    op: str
    inputs: tuple[tuple[str, TensorSpec], ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[tuple[str, Any], ...] = ()
    options: frozenset[str] = frozenset()

    def input(self, name: str) -> TensorSpec:
        """The input called `name`; KeyError if the call has none such."""
        return dict(self.inputs)[name]

    def has_input(self, name: str) -> bool:
        return any(name == given for given, _ in self.inputs)

    def attribute(self, name: str) -> Any:
        """The attribute called `name`; KeyError if the call has none such."""
        return dict(self.attributes)[name]

    def option(self, name: str) -> Any:
        """The attribute called `name`, or 0 if the call leaves it out."""
        return dict(self.attributes).get(name, 0)
