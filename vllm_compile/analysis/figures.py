"""What a step costs on a chip, and each operator in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_compile.ops.qkv_rope_attention import attention_of

from .cost import kv_token_bytes
from .graph import Call, numbered_calls
from .kernels import Chooser, library
from .roofline import bound_seconds
from .savings import Saving, Stage, Step, fusion_savings, packing_saving, run_in_step, tiling_saving


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


def step_figures(
    stages: Sequence[Stage], chooser: Chooser, weights: int, phase: str, context: int, step: Step
) -> StepFigures:
    """Of one step of the module behind the last stage; `weights` are bytes of all weights, plain copies included."""
    workload, chip = step.workload, step.chip
    run = run_in_step(stages[-1].calls)
    numbered = [(number, call) for number, call in numbered_calls(stages[-1].calls) if not call.once]
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
