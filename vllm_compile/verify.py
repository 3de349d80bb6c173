"""Compares a compiled model with Hugging Face: layer by layer, end to end, prefill and decode.

Weights are streamed on both sides, so verifying never holds a whole model.  Nothing here
imports TVM: the kernels run as they will when serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .accuracy import FP32_ERROR, as_accurate, as_accurate_by_token, mean_kl, relative_error
from .frontend.checkpoint import Checkpoint, DummyCheckpoint
from .frontend.conversion import open_checkpoint, weight_conversions
from .frontend.hf import read_config
from .paged_batch import PagedBatch
from .reference import Reference
from .runtime.manifest import PLAN
from .runtime.plan import Plan, from_json, kernel_steps
from .runtime.program import device_of
from .streamed import StreamedProgram

# Prompts of one length are one batch for Hugging Face, whose weights are streamed once per batch.
QUICK_PROMPTS, FULL_PROMPTS = (27, 27), (1, 17, 17, 64, 150)
# Of a mixture of experts: a token that a near tie sent to another expert changes what follows it in its prompt, so most
# tokens are in short ones.
QUICK_ROUTED_PROMPTS = (8,) * 20
FULL_ROUTED_PROMPTS = FULL_PROMPTS + 2 * QUICK_ROUTED_PROMPTS
DECODED = 4  # the last tokens of each prompt are fed one at a time


@dataclass(frozen=True)
class Report:
    """What a verification saw.

    Errors are relative, |a - b| / |b| in the 2-norm over all tokens.

    Attributes:
        layers: error of each layer on Hugging Face's input for it (the last is the final norm's output).
        error, reference_error: of our logits, and of Hugging Face's in the same dtype, against its fp32.
        kl, reference_kl: mean KL divergence in nats from Hugging Face's fp32 distribution.
        agreement: share of positions whose most likely token is that of Hugging Face in the same dtype.
        greedy: share of positions where the program names its own most likely token; None if it names none.
        passed: by the rules of `accuracy.py`, and `greedy` is all of them.
        microseconds: median time of each kernel's calls, by symbol.
    """

    tokens: int
    layers: list[float]
    error: float
    reference_error: float
    kl: float
    reference_kl: float
    agreement: float
    greedy: float | None
    passed: bool
    microseconds: dict[str, float]


@dataclass(frozen=True)
class References:
    """What Hugging Face makes of prompts, in the plan's dtype and in float32; see `Reference.run`.

    Attributes:
        prompts: token ids, each [T].
        same, wide: what `Reference.run` gives in either dtype, for each batch of prompts of one length.
    """

    plan: Plan
    device: torch.device
    prompts: list[torch.Tensor]
    same: list[tuple]
    wide: list[tuple]


def verify(
    artifact: Path,
    model: Path,
    target: str = "cpu",
    dummy_seed: int | None = None,
    seed: int = 0,
    lengths: Sequence[int] | None = None,
    quick: bool = False,
) -> Report:
    """Verify the artifact's plan and kernels against the model it was made from; both run on the target's device.

    Args:
        artifact: directory with plan.json, kernels.so and model-*.safetensors.
        model: the Hugging Face directory.
        target: what the artifact is compiled for, as `--target` names it.
        dummy_seed: seed of the dummy weights, if it was compiled with such.
        lengths: tokens of each prompt, drawn at random from `seed`; None: those of the quick or the full form.
    """
    return compare(artifact, run_references(artifact, model, target, dummy_seed, seed, lengths, quick))


def run_references(
    artifact: Path,
    model: Path,
    target: str,
    dummy_seed: int | None = None,
    seed: int = 0,
    lengths: Sequence[int] | None = None,
    quick: bool = False,
) -> References:
    """The half of `verify` that needs nothing of the artifact but its plan."""
    plan = from_json((artifact / PLAN).read_text())
    dtype: torch.dtype = getattr(torch, plan.model.dtype)
    lengths = lengths or prompt_lengths(plan, quick)
    config = read_config(model)
    checkpoint = _checkpoint(model, config, dtype, dummy_seed)
    generator = torch.Generator().manual_seed(seed)
    longest, device = plan.model.max_positions, device_of(target)
    drawn = (torch.randint(0, plan.model.vocab_size, (min(n, longest),), generator=generator) for n in lengths)
    prompts = [prompt.to(device) for prompt in drawn]
    batches = [torch.stack(list(group)) for _, group in groupby(prompts, key=len)]
    # Built one after the other: transformers sets torch's default dtype while it builds a model.
    models = {d: Reference(config, checkpoint, d, device) for d in (dtype, torch.float32)}
    with ThreadPoolExecutor() as pool:
        runs = {d: pool.submit(lambda m: [m.run(ids) for ids in batches], m) for d, m in models.items()}
        return References(plan, device, prompts, runs[dtype].result(), runs[torch.float32].result())


def compare(artifact: Path, references: References) -> Report:
    """The other half: the artifact's kernels and weights beside the references."""
    plan, prompts, same, wide = references.plan, references.prompts, references.same, references.wide
    program = StreamedProgram(artifact, plan, references.device)
    logits = torch.cat(_run(program, plan, prompts))
    layers = _layer_outputs(program, plan, prompts, same)
    reference, exact = torch.cat([r[2] for r in same]), torch.cat([r[2] for r in wide])
    error, reference_error = relative_error(logits, exact), relative_error(reference, exact)
    kl, reference_kl = mean_kl(exact, logits), mean_kl(exact, reference)
    if plan.model.dtype == "float32":
        passed = error <= FP32_ERROR
    elif _routes(plan):
        passed = as_accurate_by_token(logits, reference, exact, layers)
    else:
        passed = as_accurate(logits, reference, exact)
    agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()
    tokens_T1 = program.greedy(logits)
    greedy = None if tokens_T1 is None else (tokens_T1[:, 0] == logits.argmax(-1)).float().mean().item()
    passed = passed and greedy in (None, 1.0)
    times = {symbol: round(median(seconds) * 1e6, 1) for symbol, seconds in program.timings.items()}
    by_layer = [relative_error(*outputs) for outputs in layers]
    tokens = sum(map(len, prompts))
    return Report(tokens, by_layer, error, reference_error, kl, reference_kl, agreement, greedy, passed, times)


def prompt_lengths(plan: Plan, quick: bool) -> tuple[int, ...]:
    """Tokens of each prompt that the quick or the full form draws for a plan."""
    if _routes(plan):
        return QUICK_ROUTED_PROMPTS if quick else FULL_ROUTED_PROMPTS
    return QUICK_PROMPTS if quick else FULL_PROMPTS


def _routes(plan: Plan) -> bool:
    """Whether it is a mixture of experts."""
    return any(step.op == "route" for _, step in kernel_steps(plan.functions))


def _checkpoint(model: Path, config: Any, dtype: torch.dtype, dummy_seed: int | None) -> Checkpoint | DummyCheckpoint:
    built = Reference.model(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    return open_checkpoint(model, shapes, dtype, dummy_seed, weight_conversions(built))


def _run(program: StreamedProgram, plan: Plan, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of each prompt: all prompts in one batch, then their last tokens one by one."""
    lengths = [len(p) for p in prompts]
    batch = PagedBatch(plan.model, lengths, prompts[0].device)
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    begin = [0] * len(prompts)
    for back in range(DECODED, -1, -1):
        end = [max(n - back, min(n, 1)) for n in lengths]
        ids = torch.cat([p[b:e] for p, b, e in zip(prompts, begin, end, strict=True)]).int()
        hidden = program.forward(ids, batch.kv, batch.step(begin, end))
        logits = program.logits(hidden.clone()).clone()
        for row, part in zip(rows, logits.split([e - b for b, e in zip(begin, end, strict=True)]), strict=True):
            row.append(part)
        begin = end
    return [torch.cat(row) for row in rows]


def _layer_outputs(
    program: StreamedProgram, plan: Plan, prompts: list[torch.Tensor], references: list[tuple]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What every layer makes of Hugging Face's input for it, and what Hugging Face does; [T, D] each."""
    lengths = [len(p) for p in prompts]
    batch = PagedBatch(plan.model, lengths, prompts[0].device)
    inputs = [torch.cat(parts) for parts in zip(*(r[0] for r in references), strict=True)]
    outputs: list[torch.Tensor] = []

    def observe(layer: int, hidden: torch.Tensor) -> None:
        if layer:
            outputs.append(hidden.clone())
        hidden.copy_(inputs[layer])

    step = batch.step([0] * len(prompts), lengths)
    outputs.append(program.forward(torch.cat(prompts).int(), batch.kv, step, observe))
    return list(zip(outputs, [*inputs[1:], torch.cat([r[1] for r in references])], strict=True))
