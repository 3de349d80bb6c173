"""A model on a chip, from its configuration: blocks, costs, bounds, savings and predicted step times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tvm

from vllm_compile.driver import fuse_model
from vllm_compile.errors import TargetError
from vllm_compile.frontend.families import long_positions, max_positions
from vllm_compile.frontend.hf import read_config, read_config_file
from vllm_compile.frontend.read_model import dtype_of, read_model
from vllm_compile.model_files import find_files
from vllm_compile.relax_passes.pipeline import run_passes
from vllm_compile.relax_passes.record import PassRecord
from vllm_compile.schedules.select import operators
from vllm_compile.targets import CHIPS, Chip, Target, resolve
from vllm_compile.targets.cuda import CudaTarget

from .blocks import find_blocks
from .cost import Workload
from .figures import StepFigures, step_figures
from .graph import Call, calls, numbered_calls
from .kernels import Chooser
from .probe import measure_cpu
from .savings import Stage, Step
from .weights import count_weights


@dataclass(frozen=True)
class Edge:
    """Data from one operator of a function to another; -1 is the function's input."""

    source: int
    sink: int


@dataclass(frozen=True)
class Analysis:
    """All that is known of a model on a chip before anything is built.

    Attributes:
        model: type, sizes and dtype from its configuration.
        chip: see `Chip`.
        parameters: weights of the model, tied ones once.
        weight_bytes: of all weights, plain; stored_bytes: as `compile` stores them.
        blocks: see `find_blocks`.
        passes: matches of each pass.
        graph: the edges of each function's operators, which `StepFigures.ops` number.
        warnings: what the user should know.
    """

    model: dict[str, Any]
    target: str
    chip: Chip
    parameters: int
    weight_bytes: int
    stored_bytes: int
    blocks: dict[str, int]
    passes: dict[str, int]
    graph: dict[str, list[Edge]]
    steps: list[StepFigures]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def analyze(
    model: Path,
    target: str = "cpu",
    batches: Sequence[int] = (1, 64),
    contexts: Sequence[int] = (1024,),
    chip: str | Chip | None = None,
    dtype: str | None = None,
    pack: str = "lossless",
) -> Analysis:
    """Count what a model's steps cost, and predict how long they take, without weights and without the hardware.

    Args:
        model: a Hugging Face directory, of which only config.json is read, or such a file itself; or an ONNX model.
        target: what to compile for.
        batches, contexts: each batch with each context is a decode step (`context` cached tokens a request) and a
            prefill (a prompt of `context` tokens a request).
        chip: of the target, itself or by name; None: the target's own, or this machine's CPU, measured.
        dtype: bfloat16 or float32; None keeps the model's own.
        pack: `lossless` or `none`, as for `compile_model`.

    Raises:
        ModelError, UnsupportedError: see `compile_model`; also for an operator whose cost is not known.
        TargetError: the target or chip is unknown.
    """
    machine = resolve(target)
    if isinstance(machine, CudaTarget) and isinstance(chip, str) and chip in CHIPS[machine.name]:
        machine = resolve(chip)  # kernels are chosen by chip
    where = _chip(machine, chip)
    stages: list[Stage] = []
    config, dtype, records = _fuse(
        model, dtype, machine, lambda name, module: stages.append(Stage(name, calls(module)))
    )
    fused = stages[-1].calls
    chooser = Chooser(machine, pack == "lossless")
    weights = count_weights(fused, chooser)
    workloads = [("decode", c, Workload(b, 1, c)) for c in contexts for b in batches]
    workloads += [("prefill", c, Workload(b, c, 0)) for c in contexts for b in batches]
    figures = partial(step_figures, stages, chooser, weights.stored + weights.copies)
    steps = [figures(phase, context, Step(workload, dtype, where)) for phase, context, workload in workloads]
    warnings = [f"compiling for {target} would be refused: {line}" for line in chooser.refused]
    most = max(max_positions(config), long_positions(config))
    if longer := sorted({c for c in contexts if c > most}):
        asked = ", ".join(f"{c:,}" for c in longer)
        warnings.append(f"the model has {most:,} positions; a context of {asked} needs another rope scaling")
    facts = {
        "name": _name(model),
        "type": config.model_type,
        "architectures": [str(name) for name in config.architectures or []],
        "dtype": dtype,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_positions": most,
    }
    return Analysis(
        model=facts,
        target=target,
        chip=where,
        parameters=weights.parameters,
        weight_bytes=weights.plain,
        stored_bytes=weights.stored,
        blocks=find_blocks(stages[0].calls, fused, config.hidden_size),
        passes={record.name: record.matches for record in records},
        graph=_edges(fused),
        steps=steps,
        warnings=warnings,
    )


def _fuse(
    model: Path, dtype: str | None, machine: Target, after_each: Callable[[str, tvm.IRModule], None]
) -> tuple[Any, str, list[PassRecord]]:
    """The configuration, what is computed in, and what the passes did; no weight is read."""
    files = find_files(model)
    if files.graph is not None:
        opened = read_model(files, dtype, dummy_seed=0)
        return opened.config, opened.dtype, run_passes(opened.module, after_each, operators(machine))[1]
    config = read_config_file(model) if model.is_file() else read_config(model)
    dtype = dtype_of(config, dtype)
    return config, dtype, fuse_model(config, dtype, after_each, operators(machine))[1]


def _chip(machine: Target, name: str | Chip | None) -> Chip:
    if isinstance(name, Chip):
        return name
    known = CHIPS[machine.resolved_by]
    if name is None and not known:
        return measure_cpu(machine)
    if name is not None and name not in known:
        has = f"it has: {', '.join(known)}" if known else "its only one is this machine's"
        raise TargetError(f"target {machine.resolved_by} has no chip {name!r}; {has}")
    own = machine.chip if isinstance(machine, CudaTarget) else next(iter(known))
    return known[name or own]


def _name(model: Path) -> str:
    """What to call a model: its directory, or a configuration's own file."""
    path = model.resolve()
    return (
        path.stem if path.is_file() and path.name != "config.json" else (path.parent if path.is_file() else path).name
    )


def _edges(fused: Sequence[Call]) -> dict[str, list[Edge]]:
    """Where each operator's activations come from."""
    edges: dict[str, list[Edge]] = {}
    for number, call in numbered_calls(fused):
        found = edges.setdefault(call.function, [])
        for name, made_by in call.reads.items():
            if made_by:
                found += [Edge(source, number) for source in made_by]
            elif name in {"x", "residual"} and name not in call.weights:
                found.append(Edge(-1, number))
    return edges
