"""Ranks the candidates of a task for a chip that is not at hand: built, and timed by a model of it; nothing is run.

Candidates whose machine code keeps registers in memory are left out.  All others leave a record that says `estimated`,
but for those that would take the default's place although the model can hardly tell them apart, and for all but the
first of those that it cannot tell apart at all.
"""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from itertools import groupby
from math import inf
from typing import Any

from vllm_compile.targets import resolve

from ..database.executors import Outcome
from ..database.machine import fingerprint
from ..database.record import How, Provenance, Record, Schedule, Times
from ..database.workload import Workload
from ..family import Config
from ..rocm.build import compile_kernels
from ..rocm.estimate import seconds_of
from ..select import FAMILIES
from .measure import NO_WORSE, author
from .prepare import call_of


def estimate(payload: dict[str, Any]) -> Outcome:
    """For each range of a task (task.py) records of its configurations, the best first.

    `result` has, for each range: `tokens`, `tried`, `unfit` (configurations that do not fit the chip), `default_us`
    and `best_us`.

    Raises:
        RuntimeError: a default does not fit.
    """
    case = _Case(payload)
    found = [case.ranked(*entry) for entry in payload["ranges"]]
    return Outcome([summary for summary, _ in found], [record for _, records in found for record in records])


class _Case:
    """A call of a family with its configurations, built."""

    def __init__(self, payload: dict[str, Any]) -> None:
        self._target: Any = resolve(payload["target"])
        self._family: Any = next(f for f in FAMILIES[self._target.name] if f.name == payload["family"])
        self._spec = call_of(json.loads(payload["ranges"][0][0]))
        self._configs: list[Config] = []
        for _, _, wanted in payload["ranges"]:
            self._configs += [config for config in wanted if config not in self._configs]
        kernels = {f"k{i}": self._family.build(self._spec, c, self._target) for i, c in enumerate(self._configs)}
        self._resources = compile_kernels(kernels, self._target)[0].resources
        self._provenance = Provenance(author(), int(time.time()), platform.node(), version("vllm-compile"))

    def ranked(self, workload: str, tokens: int, configs: list[Config]) -> tuple[dict[str, Any], list[Record]]:
        """Of one range: a summary, and the records, the best first."""
        default, *others = [(self._seconds(config, tokens), config) for config in configs]
        if default[0] == inf:
            raise RuntimeError(f"the default {configs[0]} does not fit {self._target.device}")
        told_apart = [c for c in others if c[0] < NO_WORSE * default[0] or default[0] < c[0] < inf]
        ascending = sorted([default, *told_apart], key=lambda candidate: candidate[0])
        ranking = [next(equal) for _, equal in groupby(ascending, key=lambda candidate: candidate[0])]
        summary = {
            "tokens": tokens,
            "tried": len(configs),
            "unfit": [config for seconds, config in others if seconds == inf],
            "default_us": default[0] * 1e6,
            "best_us": ranking[0][0] * 1e6,
        }
        return summary, [self._record(workload, tokens, *candidate) for candidate in ranking]

    def _seconds(self, config: Config, tokens: int) -> float:
        footprint = self._family.footprint(self._spec, config, tokens, self._target)
        resources = self._resources[f"k{self._configs.index(config)}_kernel"]
        return seconds_of(footprint, resources, self._target)

    def _record(self, workload: str, tokens: int, seconds: float, config: Config) -> Record:
        rate = self._family.footprint(self._spec, config, tokens, self._target).bytes / seconds
        return Record(
            Workload.from_text(workload),
            fingerprint(self._target),
            Schedule.of_family(self._family.name, config),
            How.ESTIMATED,
            Times(seconds * 1e6, seconds * 1e6, seconds * 1e6),
            rate / 1e9,
            rate / self._target.bandwidth,
            None,
            self._provenance,
        )
