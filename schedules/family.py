"""What a kernel family is: one way to compute an operator on some targets.

A family is one file.  It says which calls it serves, how it wants the weights laid out,
which variants exist for which numbers of tokens, and builds a PrimFunc for each.  To add
one, write the file and list it in the target's table of families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tvm import tirx

from vllm_compile.spec import OpSpec, TensorSpec
from vllm_compile.targets import Target

from .layouts import Layout

if TYPE_CHECKING:
    from .design import Design

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """A kernel that serves calls of at least `min_tokens` tokens (up to the next variant's).

    `record` says where in a tuning database the configuration comes from, None if it does not; `passed_over` which one
    would have been preferred, and why (`reason`) it is of no use here.
    """

    min_tokens: int
    config: Config = field(default_factory=dict)
    record: Mapping[str, Any] | None = None
    passed_over: Mapping[str, Any] | None = None


class Tuned(Protocol):
    """Configurations that were found by tuning: what a choice of kernels asks before it goes by a family's rules."""

    def find(
        self,
        family: KernelFamily,
        spec: OpSpec,
        layouts: Mapping[str, Layout],
        tokens: tuple[int, int | None],
        default: Variant,
        problem: Callable[[Config], str],
    ) -> Variant:
        """The best variant of the family known for calls of `tokens`, least and most (None: no limit), or the default.

        `problem` says why a configuration is of no use here; nothing of one that is.
        """


@dataclass(frozen=True)
class Prologue:
    """A call of ours that comes before what takes over.

    Attributes:
        call: it is given inputs of the whole call.
        rest: what is left; inputs that the whole call lacks are results of `call`, in order.
    """

    call: OpSpec
    rest: OpSpec


@dataclass(frozen=True)
class Vendor:
    """What takes over in large batches: a library of the serving environment, or another kernel of ours.

    Attributes:
        function: of `runtime/vendor.py`; it is called with the call's inputs (weights plain), attributes and `out`.  Or
            a call of ours, with the call's inputs.
        min_tokens: from so many tokens on.
        prefill: only where a request has several tokens.
        epilogue: the call of ours that makes the result of what the function leaves in its one input; None if
            the function's result is the call's.
        prologue: if the function does only the last part of the call, what comes before it.
    """

    function: str | OpSpec
    min_tokens: int
    prefill: bool = False
    epilogue: OpSpec | None = None
    prologue: Prologue | None = None


@dataclass(frozen=True)
class TorchCall:
    """A part of a call that a function of torch computes, where torch makes a chip's graphs.

    Attributes:
        function: of `runtime/torch_functions.py`.
        inputs: its arguments' names, each with the value's: an input of the call, or a result of an earlier part.
        results: names and tensors of what it returns; those of the call are `out0`, `out1` and so on.
        attributes: its other arguments.
        kernel: it has a kernel of ours, which `KernelFamily.build` makes; the function is told its symbol.
    """

    function: str
    inputs: tuple[tuple[str, str], ...]
    results: tuple[tuple[str, TensorSpec], ...]
    attributes: tuple[tuple[str, Any], ...] = ()
    kernel: bool = False


class KernelFamily(Protocol):
    """One way to compute `op`; a family is a subclass, which takes over the defaults below."""

    @property
    def name(self) -> str:
        """What records call it: `target.family`."""

    @property
    def op(self) -> str:
        """The operator it computes."""

    @property
    def options(self) -> frozenset[str]:
        """The operator's options (attributes that a call may leave out) that it knows."""
        return frozenset()

    def serves(self, spec: OpSpec, target: Target) -> bool:
        """True if `build` can make a kernel for this call on this target."""

    def layouts(self, spec: OpSpec, target: Target) -> Mapping[str, Layout]:
        """The layout in which the kernel reads each weight input; a weight not named stays as it is.

        `spec` is the call with plain weights.
        """
        return {}

    def variants(self, spec: OpSpec, target: Target) -> Sequence[Variant]:
        """The default choice by number of tokens, ascending; the first has min_tokens 1."""
        return (Variant(1),)

    def space(self, spec: OpSpec, target: Target) -> Sequence[Config]:
        """Every configuration that tuning may try; none if there is nothing to choose."""
        return ()

    def candidates(self, spec: OpSpec, min_tokens: int, target: Target) -> Sequence[Config]:
        """What is worth trying of `space` for calls of so many tokens and more: all that `admits` admits."""
        return [c for c in self.space(spec, target) if self.admits(spec, c, min_tokens, target)]

    def admits(self, spec: OpSpec, config: Config, min_tokens: int, target: Target) -> bool:
        """True if a tuned configuration may take the place of the default for calls of so many tokens and more."""
        return False

    def design(self, spec: OpSpec, tokens: int, target: Target) -> Design | None:
        """What MetaSchedule may search, beside `space`, for calls of exactly so many tokens; None if nothing."""
        return None

    def vendor(self, spec: OpSpec, target: Target) -> Vendor | None:
        """Who takes over in large batches, if anybody."""
        return None

    def launches(self, spec: OpSpec, config: Config, tokens: int, target: Target) -> int:
        """Kernels that a call of so many tokens starts, one after the other."""
        return 1

    def torch_calls(self, spec: OpSpec) -> Sequence[TorchCall]:
        """The call as functions of torch, in order; none where kernels compute all of it."""
        return ()

    def build(self, spec: OpSpec, config: Config, target: Target) -> tirx.PrimFunc:
        """The kernel, called as `kernel(*inputs, *outputs)`; `spec` is the call with plain weights."""
