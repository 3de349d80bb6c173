"""What MetaSchedule may search: a kernel in plain TIR, and the spaces of its schedules.

A schedule is kept as its trace: the steps of a space with the decisions that were taken.  Only what a space of ours can
give is replayed, since a trace may come from anywhere, and a step can put any code into a kernel.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import ScheduleError, Trace
from tvm_ffi import structural_hash

from vllm_compile.canonical import canonical, sha256

SAMPLED = "SamplePerfectTile"  # the step that decides
SEARCHED = "EnterPostproc"  # the first of the steps that MetaSchedule adds
# Of a configuration: a trace's canonical JSON; for how many tokens it is; of which spaces (`Design.space`).
TRACE, TOKENS, SPACE = "trace", "tokens", "space"


@dataclass(frozen=True, eq=False)
class Design:
    """A kernel whose schedule is searched.

    Attributes:
        tokens: how many the kernel is for; no other number.
        module: `main` is the kernel, not scheduled.
        spaces: from a schedule of it, one schedule for each space; its decisions are samples.
        lowered: of a scheduled module: the kernel to be built.
    """

    tokens: int
    module: tvm.IRModule
    spaces: Callable[[Schedule], Sequence[Schedule]]
    lowered: Callable[[tvm.IRModule], tirx.PrimFunc]
    _built: dict[str, tirx.PrimFunc] = field(default_factory=dict, repr=False)  # by trace

    def config(self, trace: Trace) -> dict[str, Any]:
        """The configuration of a kernel family that stands for a trace."""
        return {TRACE: text_of(trace), TOKENS: self.tokens, SPACE: self.space}

    @cached_property
    def space(self) -> str:
        """SHA-256 of what the spaces make: of each, its steps, and the kernel that some decisions give.

        A trace that was measured under another one may make another kernel here, of the same steps.
        """
        drawn = self.spaces(Schedule(self.module, seed=1))
        return sha256(canonical([[text_of(s.trace), str(structural_hash(self.lowered(s.mod)))] for s in drawn]))

    def build(self, trace: str) -> tirx.PrimFunc:
        """The kernel that a trace's text makes.

        Raises:
            ValueError: it is no trace of these spaces.
        """
        if not isinstance(trace, str):
            raise ValueError("a trace is a text")
        if trace not in self._built:
            self._built[trace] = self._replayed(trace)
        return self._built[trace]

    def _replayed(self, trace: str) -> tirx.PrimFunc:
        schedule = Schedule(self.module)
        steps, decisions = self._parts(trace)
        ours = next((known for known in self._steps if known == steps), None)
        if ours is None:
            raise ValueError("the trace has steps that no space of this version has")
        if not _are_decisions_of(ours, decisions):
            raise ValueError("the trace's decisions are not tiles within the limits of its steps")
        try:
            Trace.apply_json_to_schedule([ours, decisions], schedule)
        except (ScheduleError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the trace cannot be replayed: {error}") from error
        if self._parts(text_of(schedule.trace)) != (steps, decisions):
            raise ValueError("TVM took other decisions than the trace has: they do not fit the kernel's sizes")
        return self.lowered(schedule.mod)

    def knows(self, trace: Any) -> bool:
        """True if this JSON of a trace, after the search's own last steps are taken off, is one of these spaces'."""
        try:
            steps, decisions = trace
            names = [name for name, *_ in steps]
            length = names.index(SEARCHED) if SEARCHED in names else len(names)
            return self.admits(canonical([steps[:length], [pair for pair in decisions if pair[0] < length]]))
        except (TypeError, ValueError, IndexError):
            return False

    def admits(self, trace: str) -> bool:
        """True if `build` can make a kernel of it; whoever asks may go on to build it, which is done once."""
        try:
            self.build(trace)
        except ValueError:
            return False
        return True

    @cached_property
    def _steps(self) -> list[Any]:
        """Of each space, as JSON."""
        return [self._parts(text_of(space.trace))[0] for space in self.spaces(Schedule(self.module))]

    @staticmethod
    def _parts(trace: str) -> tuple[Any, Any]:
        try:
            steps, decisions = json.loads(trace)
        except (TypeError, ValueError) as error:
            raise ValueError(f"no trace: {error}") from error
        return steps, decisions


def traced(design: Design | None, config: Mapping[str, Any]) -> tirx.PrimFunc:
    """The kernel of a configuration that is a trace; ValueError if it is none of the design."""
    assert design is not None, config
    return design.build(config[TRACE])


def _are_decisions_of(steps: Any, decisions: Any) -> bool:
    """True if there are two factors above zero for each sampled tile, the inner one within the sample's limit.

    TVM takes an index and a divisor from a trace as they are: others end or corrupt the process.
    """
    most = {number: step[2][1] for number, step in enumerate(steps) if step[0] == SAMPLED}
    if not isinstance(decisions, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in decisions):
        return False
    if [number for number, _ in decisions] != list(most):
        return False
    return all(
        isinstance(tiles, list)
        and len(tiles) == 2
        and all(type(factor) is int and factor > 0 for factor in tiles)
        and tiles[1] <= most[number]
        for number, tiles in decisions
    )


def text_of(trace: Trace) -> str:
    """The canonical JSON of a trace, without what comes after the schedule itself."""
    return canonical(plain(trace.as_json(remove_postproc=True)))


def plain(value: Any) -> Any:
    """TVM's containers and numbers as Python's."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "__iter__"):
        return [plain(item) for item in value]
    return plain(value.value)
