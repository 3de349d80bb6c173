"""A model on a chip, from its configuration: blocks, costs, bounds, savings and predicted step times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import tvm

from vllm_compile.driver import fuse_model
from vllm_compile.errors import TargetError
from vllm_compile.frontend.families import long_positions, max_positions
from vllm_compile.frontend.hf import read_config, read_config_file
from vllm_compile.frontend.read_model import dtype_of, read_model
from vllm_compile.model_files import find_files
from vllm_compile.ops.qkv_rope_attention import attention_of
from vllm_compile.relax_passes.outline_layers import FORWARD, LOGITS
from vllm_compile.relax_passes.pipeline import run_passes
from vllm_compile.relax_passes.record import PassRecord
from vllm_compile.schedules.select import operators
from vllm_compile.spec import TensorSpec
from vllm_compile.targets import CHIPS, Chip, Target, resolve
from vllm_compile.targets.cuda import CudaTarget

from .blocks import find_blocks
from .cost import Workload, kv_token_bytes
from .graph import Call, calls
from .kernels import Chooser, library
from .probe import measure_cpu
from .roofline import bound_seconds
from .savings import Saving, Stage, Step, fusion_savings, packing_saving, run_in_step, tiling_saving

POSITION_TABLE = "position_table"  # what the importer calls them


@dataclass(frozen=True)
class OpFigures:
    """One operator in one step, all figures of a single call.

    Attributes:
        function, number, label: where it stands and what it is; `number` counts the calls of its function.
        times: calls in one step.
        flops, weight_bytes, kv_bytes, activation_bytes, intensity: see `Cost`.
        bound_us: the least time at the chip's peaks.
        predicted_us: the time to expect; `memory_us`, `compute_us` and `launch_us` are its parts.
        bound: memory, compute or launch: what most of the predicted time goes to.
        library: a library's kernel, in large batches.
    """

    function: str
    number: int
    label: str
    times: int
    flops: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    intensity: float
    bound_us: float
    predicted_us: float
    memory_us: float
    compute_us: float
    launch_us: float
    bound: str
    library: bool


@dataclass(frozen=True)
class StepFigures:
    """One step: decode (a token for each request) or prefill (a prompt of `context` tokens for each).

    Attributes:
        bound_ms: the least time at the chip's peaks, each operator after the other.
        predicted_ms: the time to expect of what `compile` makes, the engine around it left out.
        library_ms: the same of plain weights in a library's kernels; None if none takes part on the chip.
        shares: of memory, compute and launches in predicted_ms.
        tokens_per_second: of all requests together.
        kv_cache_bytes: of all requests.
        memory_bytes: weights and KV cache, plain copies for a library included.
        score_bytes: what attention's scores would take without tiles, in one layer.
    """

    phase: str
    batch: int
    context: int
    flops: int
    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    bound_ms: float
    predicted_ms: float
    library_ms: float | None
    shares: dict[str, float]
    tokens_per_second: float
    kv_cache_bytes: int
    memory_bytes: int
    score_bytes: int
    ops: list[OpFigures]
    savings: list[Saving]


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
    weights = _weights(fused, chooser)
    workloads = [("decode", c, Workload(b, 1, c)) for c in contexts for b in batches]
    workloads += [("prefill", c, Workload(b, c, 0)) for c in contexts for b in batches]
    figures = partial(_figures, stages, chooser, weights.stored + weights.copies)
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
    if machine.name not in CHIPS:
        raise TargetError(f"no chip of target {machine.name} is known yet; analyze knows those of {', '.join(CHIPS)}")
    known = CHIPS[machine.name]
    if name is None and not known:
        return measure_cpu(machine)
    if name is not None and name not in known:
        has = f"it has: {', '.join(known)}" if known else "its only one is this machine's"
        raise TargetError(f"target {machine.name} has no chip {name!r}; {has}")
    own = machine.chip if isinstance(machine, CudaTarget) else next(iter(known))
    return known[name or own]


def _figures(
    stages: Sequence[Stage], chooser: Chooser, weights: int, phase: str, context: int, step: Step
) -> StepFigures:
    workload, chip = step.workload, step.chip
    run = run_in_step(stages[-1].calls)
    numbered = [(number, call) for number, call in _numbered(stages[-1].calls) if not call.once]
    ops = [_op(call, number, chooser, step) for number, call in numbered]
    whole = step.total(run, chooser.compiled)
    cost, time = whole.cost, whole.time
    tiling, score_bytes = tiling_saving(run, step)
    token = sum(kv_token_bytes(call.spec) * call.times for call in run if attention_of(call.spec) is not None)
    cache = token * workload.requests * workload.length
    parts = {"memory": time.memory, "compute": time.compute, "launch": time.launch}
    return StepFigures(
        phase=phase,
        batch=workload.requests,
        context=context,
        flops=cost.flops,
        weight_bytes=cost.weight_bytes,
        kv_bytes=cost.kv_bytes,
        activation_bytes=cost.activation_bytes,
        bound_ms=sum(op.bound_us * op.times for op in ops) / 1e3,
        predicted_ms=time.total * 1e3,
        library_ms=None if chip.vendor_launch is None else step.total(run, library).time.total * 1e3,
        shares={name: part / time.total for name, part in parts.items()},
        tokens_per_second=workload.tokens / time.total,
        kv_cache_bytes=cache,
        memory_bytes=weights + cache,
        score_bytes=score_bytes,
        ops=ops,
        savings=[*fusion_savings(stages, step), packing_saving(run, step, chooser.compiled), tiling],
    )


def _numbered(all_calls: Sequence[Call]) -> list[tuple[int, Call]]:
    """Each call with its number in its function."""
    seen: dict[str, int] = {}
    numbered = []
    for call in all_calls:
        numbered.append((seen.setdefault(call.function, 0), call))
        seen[call.function] += 1
    return numbered


def _op(call: Call, number: int, chooser: Chooser, step: Step) -> OpFigures:
    once = step.of(call, chooser.compiled)
    cost, time = once.cost, once.time
    return OpFigures(
        function=call.function,
        number=number,
        label=call.label,
        times=call.times,
        flops=cost.flops,
        weight_bytes=cost.weight_bytes,
        kv_bytes=cost.kv_bytes,
        activation_bytes=cost.activation_bytes,
        intensity=cost.intensity,
        bound_us=bound_seconds(cost, step.dtype, step.chip) * 1e6,
        predicted_us=time.total * 1e6,
        memory_us=time.memory * 1e6,
        compute_us=time.compute * 1e6,
        launch_us=time.launch * 1e6,
        bound=time.bound,
        library=any(kernel.library for kernel in chooser.compiled(call, step.workload)),
    )


def _name(model: Path) -> str:
    """What to call a model: its directory, or a configuration's own file."""
    path = model.resolve()
    return (
        path.stem if path.is_file() and path.name != "config.json" else (path.parent if path.is_file() else path).name
    )


@dataclass(frozen=True)
class _Weights:
    """Bytes of all weights plain, as they are stored, and of plain copies that a library reads beside those."""

    parameters: int
    plain: int
    stored: int
    copies: int


def _weights(fused: Sequence[Call], chooser: Chooser) -> _Weights:
    """A weight that several calls read (a tied embedding) is stored once for each layout.

    Tables of functions of the position are stored like weights, but are no parameters.
    """
    plain: dict[Any, int] = {}
    stored: dict[Any, int] = {}
    copies: dict[Any, int] = {}
    parameters: dict[Any, int] = {}
    for number, call in _numbered(fused):
        choice = chooser.choice(call.spec)
        for name, label in call.weights.items():
            tensor = call.spec.input(name)
            shape = tuple(tensor.size(axis) for axis in range(len(tensor.shape)))
            # Within a layer each call has weights of its own; outside, their names tell which are tied.
            outside = call.function in {FORWARD, LOGITS}
            key = (label, shape) if outside else (call.function, number, name)
            plain[key] = tensor.nbytes() * call.times
            if not all(part.startswith(POSITION_TABLE) for part in label.split(" + ")):
                parameters[key] = prod(shape) * call.times
            layout = choice.layouts.get(name) if choice is not None else None
            if choice is None or layout is None:
                stored[key, None] = plain[key]
                continue
            packed = TensorSpec(layout.shape(shape), layout.dtype(tensor.dtype))
            stored[key, layout.name] = packed.nbytes() * call.times
            if choice.vendor is not None:
                copies[key] = plain[key]
    extra = sum(size for key, size in copies.items() if (key, None) not in stored)
    return _Weights(sum(parameters.values()), sum(plain.values()), sum(stored.values()), extra)


def _edges(fused: Sequence[Call]) -> dict[str, list[Edge]]:
    """Where each operator's activations come from."""
    edges: dict[str, list[Edge]] = {}
    for number, call in _numbered(fused):
        found = edges.setdefault(call.function, [])
        for name, made_by in call.reads.items():
            if made_by:
                found += [Edge(source, number) for source in made_by]
            elif name in {"x", "residual"} and name not in call.weights:
                found.append(Edge(-1, number))
    return edges
