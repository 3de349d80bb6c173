"""What there is to tune in a compiled model: calls of families that list a space of configurations."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vllm_compile.kernel_table import Kernels
from vllm_compile.lowering import Lowered
from vllm_compile.runtime.plan import kernel_steps
from vllm_compile.spec import Sym
from vllm_compile.targets import Target

from ..database.tuned import workload_of
from ..database.workload import Workload
from ..family import Config
from ..select import token_ranges

MEASURE, ESTIMATE = "measure", "estimate"  # kinds of tasks: the functions of measure.py and estimate.py
METHODS = {"cpu": MEASURE, "rocm": ESTIMATE}  # by target; others' configurations are not searched for
UNBOUNDED = 4  # a range without a most is measured at so many times its least tokens


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
        method: `MEASURE`, or `ESTIMATE` where no device is at hand.
        target: the name that it is resolved by.
        names: of the weights in the model (`model_self_attn_q_k_v_proj_weight`), for people and `--only`.
        calls: how often a step makes it.
        step_bytes: of weights that a decode step reads for it.
    """

    method: str
    family: str
    target: str
    names: tuple[str, ...]
    calls: int
    step_bytes: int
    ranges: tuple[Range, ...]

    def payload(self) -> dict[str, Any]:
        """As JSON, for `measure` or `estimate`."""
        ranges = [[r.workload.text, r.tokens, list(r.configs)] for r in self.ranges]
        return {"family": self.family, "target": self.target, "ranges": ranges}

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


def tasks_of(lowered: Lowered, target: Target, trials: int, traces: int = 0, seed: int = 0) -> list[Task]:
    """The tasks of a model, those that cost a decode step most first.

    Args:
        trials: configurations of a range at most; of larger spaces a random choice, the default always in it.
        traces: as many for each range of a single number of tokens for which the family has a design.
    """
    calls = _calls(lowered)
    found = [
        _task(kernels, calls, target, trials, traces, random.Random(seed))
        for kernels in lowered.kernels.values()
        if kernels.choice.family.space(kernels.spec, target)
    ]
    return sorted(found, key=lambda task: (-task.step_bytes, task.names))


def _task(
    kernels: Kernels, calls: Mapping[str, list[str]], target: Target, trials: int, traces: int, draw: random.Random
) -> Task:
    spec, choice = kernels.spec, kernels.choice
    space = choice.family.space(spec, target)
    ranges = []
    for variant, (least, most) in zip(choice.variants, token_ranges(choice.variants, choice.vendor), strict=True):
        others = [c for c in space if c != variant.config and choice.family.admits(spec, c, least, target)]
        if len(others) >= trials:
            others = draw.sample(others, trials - 1)
        workload = workload_of(spec, choice.layouts, (least, most))
        tokens = UNBOUNDED * least if most is None else most
        designed = traces and least == most and choice.family.design(spec, least, target) is not None
        ranges.append(Range(workload, tokens, (variant.config, *others), traces if designed else 0))
    weights = calls[kernels.symbols[0]]
    known = (tensor for _, tensor in spec.inputs if not any(isinstance(size, Sym) for size in tensor.shape))
    size = len(weights) * sum(tensor.nbytes() for tensor in known)  # weights: no call binds their shapes
    names = tuple(sorted(set(weights)))
    method = METHODS[target.name]
    return Task(method, choice.family.name, target.resolved_by, names, len(weights), size, tuple(ranges))


def _calls(lowered: Lowered) -> dict[str, list[str]]:
    """By the symbol of a call's first variant: the first weight of each call that a step makes of it."""
    found: dict[str, list[str]] = {}
    for function, step in kernel_steps(lowered.functions):
        weights = {weight.buffer for weight in function.weights}
        named = [a.buffer.partition(".")[0] for a in step.arguments if a.buffer in weights]
        found.setdefault(step.variants[0][1], []).append(named[0] if named else step.op)
    return found
