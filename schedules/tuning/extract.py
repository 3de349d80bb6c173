"""The tasks of a compiled model: its calls of families that list a space of configurations."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

from vllm_compile.kernel_table import Kernels
from vllm_compile.lowering import Lowered
from vllm_compile.runtime.plan import kernel_steps
from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets import Target, resolve

from ..database.tuned import workload_of
from ..family import Config, KernelFamily
from ..select import FAMILIES, problem, token_ranges
from .prepare import call_of
from .task import ESTIMATE, MEASURE, Range, Task

METHODS = {"cpu": MEASURE, "cuda": MEASURE, "rocm": ESTIMATE}  # by target; others' configurations are not searched for
UNBOUNDED = 4  # a range without a most is measured at so many times its least tokens


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


def family_and_call(task: Task, wanted: Range) -> tuple[KernelFamily, OpSpec]:
    """The family that a range's kernels are of, and the call that they serve."""
    families = FAMILIES[resolve(task.target).name]
    return next(f for f in families if f.name == task.family), call_of(json.loads(wanted.workload.text))


def problem_of(task: Task, wanted: Range, config: Config) -> str:
    """Why `compile` would not use a configuration for a range; nothing if it would."""
    family, spec = family_and_call(task, wanted)
    least, most = json.loads(wanted.workload.text)["tokens"]
    return problem(family, spec, (least, most), resolve(task.target), config)


def _task(
    kernels: Kernels, calls: Mapping[str, list[str]], target: Target, trials: int, traces: int, draw: random.Random
) -> Task:
    spec, choice = kernels.spec, kernels.choice
    ranges = []
    for variant, (least, most) in zip(choice.variants, token_ranges(choice.variants, choice.vendor), strict=True):
        others = [c for c in choice.family.candidates(spec, least, target) if c != variant.config]
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
