"""One record: a schedule of a workload on a machine, its times, and how they came about."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from vllm_compile.canonical import canonical, object_of, sha256
from vllm_compile.errors import DatabaseError

from .fingerprint import Fingerprint
from .workload import Workload


class How(StrEnum):
    """Where the times come from; the two are never mixed."""

    MEASURED = "measured"
    ESTIMATED = "estimated"  # by a model of the machine; nothing ran there


class ScheduleKind(StrEnum):
    PARAMETERS = "parameters"  # a kernel family and its configuration
    TRACE = "trace"  # of TVM's MetaSchedule


class State(StrEnum):
    """How far a schedule is trusted, in ascending order; merging takes the later one."""

    CANDIDATE = "candidate"
    VERIFIED = "verified"  # measured on two hosts
    PROMOTED = "promoted"  # preferred to faster ones, by somebody's word
    RETIRED = "retired"  # never given as an answer again


STATES = tuple(State)


@dataclass(frozen=True)
class Schedule:
    """A kind of schedule and its canonical JSON; ValueError if it is none."""

    kind: ScheduleKind
    text: str

    def __post_init__(self) -> None:
        content = object_of(self.text)
        of_family = isinstance(content.get("family"), str) and isinstance(content.get("config"), dict)
        of_module = self.kind == ScheduleKind.TRACE and {"trace", "target", "arguments"} <= content.keys()
        if not of_family and ("family" in content or not of_module):
            raise ValueError("neither a kernel family's configuration nor a trace")

    @staticmethod
    def of_family(family: str, config: Mapping[str, Any]) -> Schedule:
        """A kernel family's configuration: parameters, or the trace of a search by MetaSchedule."""
        kind = ScheduleKind.TRACE if "trace" in config else ScheduleKind.PARAMETERS
        return Schedule(kind, canonical({"family": family, "config": dict(config)}))

    @staticmethod
    def trace(trace: Any) -> Schedule:
        """The JSON of a MetaSchedule trace."""
        return Schedule(ScheduleKind.TRACE, canonical(trace))

    @property
    def key(self) -> str:
        return sha256(canonical([self.kind, self.text]))

    def content(self) -> Any:
        return json.loads(self.text)

    def problem(self, family: str, default: Mapping[str, Any], of_config: Callable[[Any], str]) -> str:
        """Why a family's call cannot be served so; empty if it can.  `of_config` is asked of all but the default."""
        content = self.content()
        if content.get("family") != family:
            return "it is of another kernel family"
        return "" if content["config"] == default else of_config(content["config"])


@dataclass(frozen=True)
class Times:
    """Microseconds of one call: median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Verdict:
    """The comparison of the kernel's output with the operator's reference.

    Attributes:
        error: the largest, in the units of `tolerance`.
        tolerance: the operator's.
        executed_on: what ran the kernel for the comparison (the device, or an emulator of it).
    """

    error: float
    tolerance: float
    executed_on: str


@dataclass(frozen=True)
class Provenance:
    """Who measured (or estimated), when (Unix seconds), on which host, at which commit of this project."""

    author: str
    measured_at: int
    host: str
    commit: str


@dataclass(frozen=True)
class Record:
    """What is committed; never changed afterwards, only its state is.

    Attributes:
        gb_per_s: bytes that the workload must move, by the median time, in 1e9 bytes per second.
        roofline_share: of the bound for this machine, 1.0 being all of it.
        verdict: None where nothing was compared; of what is measured, such a record cannot be committed.
    """

    workload: Workload
    target: Fingerprint
    schedule: Schedule
    how: How
    times: Times
    gb_per_s: float
    roofline_share: float
    verdict: Verdict | None
    provenance: Provenance

    def content(self) -> dict[str, Any]:
        """As JSON, without workload and target."""
        return {
            "schedule": {"kind": self.schedule.kind, "text": self.schedule.text},
            "how": self.how,
            "times": {name: float(value) for name, value in vars(self.times).items()},
            "gb_per_s": float(self.gb_per_s),
            "roofline_share": float(self.roofline_share),
            "verdict": None
            if self.verdict is None
            else {
                "error": float(self.verdict.error),
                "tolerance": float(self.verdict.tolerance),
                "executed_on": self.verdict.executed_on,
            },
            "provenance": dict(vars(self.provenance)),
        }

    @staticmethod
    def from_content(content: Mapping[str, Any], workload: Workload, target: Fingerprint) -> Record:
        """The inverse of `content`; KeyError, TypeError or ValueError if it is none."""
        return Record(
            workload,
            target,
            Schedule(ScheduleKind(content["schedule"]["kind"]), content["schedule"]["text"]),
            How(content["how"]),
            Times(**content["times"]),
            content["gb_per_s"],
            content["roofline_share"],
            None if content["verdict"] is None else Verdict(**content["verdict"]),
            Provenance(**content["provenance"]),
        )

    @cached_property
    def id(self) -> str:
        """SHA-256 of all the record says: the same in every database, and a check of what was stored."""
        return sha256(canonical([self.workload.text, self.target.text, self.content()]))


def check(record: Record, state: State = State.CANDIDATE) -> None:
    """Raise DatabaseError unless the record may be committed, in this state."""
    times, verdict = record.times, record.verdict
    numbers = (times.p10, times.median, times.p90, record.gb_per_s, record.roofline_share)
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise _refused(record, f"its times and rates must be positive numbers, not {numbers}")
    if not times.p10 <= times.median <= times.p90:
        raise _refused(record, f"its times are not in order: p10 {times.p10}, median {times.median}, p90 {times.p90}")
    if record.how == How.ESTIMATED and state in (State.VERIFIED, State.PROMOTED):
        raise _refused(record, f"it is an estimate, which cannot be {state}")
    if verdict is None and record.how == How.ESTIMATED:
        return  # a model of the machine has no output
    if verdict is None or not verdict.executed_on:
        raise _refused(record, "its output was not compared with the reference; compare it first")
    if not (math.isfinite(verdict.tolerance) and 0 <= verdict.error <= verdict.tolerance):
        raise _refused(record, f"its output is wrong: error {verdict.error}, tolerance {verdict.tolerance}")


def _refused(record: Record, reason: str) -> DatabaseError:
    return DatabaseError(f"a record of {record.workload.summary()} is not taken: {reason}")
