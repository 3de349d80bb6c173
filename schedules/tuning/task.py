"""What there is to tune: calls, ranges of tokens, configurations.  Without TVM, being read where kernels are timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..database.workload import Workload

if TYPE_CHECKING:
    from ..family import Config

# Kinds of tasks: the functions of measure.py and estimate.py.
MEASURE, MEASURE_BUILT, ESTIMATE = "measure", "measure_built", "estimate"


@dataclass(frozen=True)
class Range:
    """A range of numbers of tokens of one call: what one record is of.

    Attributes:
        workload: the call with this range.
        tokens: the number it is measured (or estimated) at.
        configs: what to try, the default first.
        traces: how many schedules of TIR MetaSchedule may try before, of which the best are added to `configs`.
    """

    workload: Workload
    tokens: int
    configs: tuple[Config, ...]
    traces: int = 0


@dataclass(frozen=True)
class Task:
    """One call, with its ranges; they share weights and kernels, hence are measured together.

    Attributes:
        method: `MEASURE`, `MEASURE_BUILT` of what was built elsewhere, or `ESTIMATE` where no device is at hand.
        target: the name that it is resolved by.
        names: of the weights in the model (`model_self_attn_q_k_v_proj_weight`), for people and `--only`.
        calls: how often a step makes it.
        step_bytes: of weights that a decode step reads for it.
        built: the folder that its candidates have been built into (built.py); empty if they have not.
    """

    method: str
    family: str
    target: str
    names: tuple[str, ...]
    calls: int
    step_bytes: int
    ranges: tuple[Range, ...]
    built: str = ""

    def to_json(self) -> dict[str, Any]:
        """All of it, but for `traces`, which are searched for where TVM is."""
        about = {"method": self.method, "names": self.names, "calls": self.calls, "step_bytes": self.step_bytes}
        return about | self.payload()

    @staticmethod
    def from_json(content: dict[str, Any]) -> Task:
        ranges = tuple(Range(Workload.from_text(w), tokens, tuple(c)) for w, tokens, c in content["ranges"])
        return Task(**{**content, "names": tuple(content["names"]), "ranges": ranges})

    def payload(self) -> dict[str, Any]:
        """As JSON, for `measure` or `estimate`."""
        ranges = [[r.workload.text, r.tokens, list(r.configs)] for r in self.ranges]
        content = {"family": self.family, "target": self.target, "ranges": ranges}
        return content | ({"built": self.built} if self.built else {})

    def configs(self) -> list[Config]:
        """Each distinct one, defaults left out."""
        defaults = [r.configs[0] for r in self.ranges]
        found: list[Config] = []
        for config in (c for r in self.ranges for c in r.configs):
            if config not in defaults and config not in found:
                found.append(config)
        return found

    def only(self, configs: Sequence[Config]) -> Task:
        """The task with these configurations and the defaults alone."""
        ranges = (replace(r, configs=(r.configs[0], *(c for c in r.configs[1:] if c in configs))) for r in self.ranges)
        return replace(self, ranges=tuple(ranges))
