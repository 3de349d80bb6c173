"""Times an artifact beside its peers: same weights, same prompts, interleaved, medians and quartiles.

Each engine lives in its own process and idles while another is timed; on a GPU they share its memory, unless it is too
small for all, or each is to have the machine to itself: then they take turns, started anew for each round, so that a
machine which changes meanwhile does so for all of them.

A decode step is the difference between generating 1 + 2n tokens and generating 1 + n, divided by n, once the prompts
are in the engine's prefix cache (which vLLM has by default; `hf` has none).  Admitting requests, in steps that do not
only decode, is in both.  Prefill is what generating one token takes, of prompts that were never seen before.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .artifact import write_plain_config
from .bandwidth import read_bandwidth
from .bench_engine import Engine
from .errors import VllmCompileError
from .frontend.checkpoint import DummyCheckpoint
from .frontend.hf import read_config
from .reference import Reference
from .runtime import gpu
from .runtime.manifest import PLAN, read_manifest
from .runtime.plan import Plan, from_json
from .runtime.program import device_of

DECODE_STEPS = {"cpu": 16, "cuda": 80, "rocm": 80}  # n, by default; a round takes 3n steps
PEER_CACHE_BYTES = 2 << 30  # vLLM's KV cache on a CPU
GPU_SHARE = 0.9  # of the GPU's memory, for all engines together
GPU_CACHE_BYTES = 6 << 30  # what an engine on a GPU needs beside its weights, to divide that share


@dataclass(frozen=True)
class Workload:
    """`batch` requests of `length` tokens each: decoded further, or prefilled at once."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


@dataclass(frozen=True)
class Row:
    """One engine on one workload.

    Attributes:
        engine: compiled, vllm, vllm-eager or hf.
        workload: decode or prefill.
        batch, length: requests at once, and the tokens of each one's prompt.
        milliseconds: median time of a decode step, or of the whole prefill.
        quartiles: half of the times are between these.  (The least of them, as of any difference, bounds nothing.)
        tokens_per_second: of all requests together.
        gigabytes_per_second: bytes of weights and cache that a step must read, over its time; 0 for prefill.
        bandwidth_share: that over the measured read bandwidth.
        speedup: median over the repeats of (engine's time / compiled's time) in the same repeat.
    """

    engine: str
    workload: str
    batch: int
    length: int
    milliseconds: float
    quartiles: tuple[float, float]
    tokens_per_second: float
    gigabytes_per_second: float
    bandwidth_share: float
    speedup: float


Measure = Callable[[Engine, list[list[int]]], float]  # seconds of an engine for prompts


def bench(
    artifact: Path,
    model: Path | None,
    against: Sequence[str],
    decodes: Sequence[Workload],
    prefills: Sequence[Workload],
    repeats: int,
    alone: bool = False,
    steps: int | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Time `artifact` and its peers.

    Returns {"device": ..., "bandwidth": GB/s, "load_seconds": {...}, "first_token_seconds": {...}, "interrupted": ...,
    "rounds": ..., "rows": [...]}; the seconds are those of each start by engine.  Interrupted (SIGINT), it ends with
    the rounds that all engines have done by then, if there are any; "rounds" is the least number that a row has.

    Args:
        artifact: what `compile` wrote.
        model: the Hugging Face directory it was made from; None for dummy weights, which are made again.
        against: names out of `bench_worker.PEERS`.
        decodes, prefills: what to time.
        repeats: how often every engine does every workload.
        alone: run one engine after the other instead of all at once, started anew for each repeat.
        steps: decode steps that are timed, after as many that are not; None for `DECODE_STEPS`.
    """
    manifest = read_manifest(artifact)
    plan = from_json((artifact / PLAN).read_text())
    target, device = manifest["target"]["name"], device_of(manifest["target"]["name"])
    if target != "cpu" and {"hf", "vllm-all-cores"} & set(against):
        raise VllmCompileError("on a GPU the peers are vllm and vllm-eager")
    bandwidth, steps = read_bandwidth(device), steps or DECODE_STEPS[target]
    most = plan.model.max_positions - 2 * steps - 1
    if most < 1:
        raise VllmCompileError(f"{artifact} has {plan.model.max_positions} positions, too few for --steps {steps}")
    # What is the same once it is no longer than the model is measured once.
    decodes, prefills = (
        list(dict.fromkeys(replace(w, length=min(w.length, most)) for w in ws)) for ws in (decodes, prefills)
    )
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        seed = manifest["source"]["dummy_weights_seed"]
        weightless = not list(artifact.glob("*.safetensors"))
        peer = model if model is not None and seed is None else _dummy_model(artifact, plan, seed, scratch, weightless)
        options = {
            "max_model_len": max(w.length for w in (*decodes, *prefills)) + 2 * steps + 1,
            "max_num_seqs": max(w.batch for w in (*decodes, *prefills)),
            **({"load_format": "dummy"} if weightless else {}),
        }
        names = ("compiled", *against)
        step: Measure = partial(_decode_step, steps=steps)
        workloads = [("decode", workload, step) for workload in decodes]
        workloads += [("prefill", workload, _prefill) for workload in prefills]
        times: dict[tuple[str, Workload], dict[str, list[float]]] = {}
        loads: dict[str, list[float]] = {name: [] for name in names}
        first_tokens: dict[str, list[float]] = {name: [] for name in names}
        interrupted = False
        try:
            for group, rounds in _turns(names, repeats, alone):
                with ExitStack() as running:
                    engines = []
                    for name, memory in _memory(group, plan, target).items():
                        progress(f"starting {name}")
                        directory = artifact if name == "compiled" else peer
                        engine = Engine(name, directory, {**options, **memory}, scratch / f"{name}.log")
                        engines.append(running.enter_context(closing(engine)))
                        loads[name].append(engine.load_seconds)
                        first_tokens[name].append(engine.first_token_seconds)
                    for kind, workload, measure in workloads:
                        progress(f"{kind}, {workload}")
                        so_far = times.setdefault((kind, workload), {name: [] for name in names})
                        for seconds in _interleaved(engines, plan, rounds, measure, kind, workload):
                            for name, figure in seconds.items():
                                so_far[name].append(figure)
        except KeyboardInterrupt:
            interrupted = True
            if not _of_all(times):
                raise
    done = _of_all(times)
    rows = [row for (kind, w), figures in done.items() for row in _rows(kind, w, figures, plan, bandwidth, steps)]
    ended = {"interrupted": interrupted, "rounds": min(len(s) for figures in done.values() for s in figures.values())}
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    starts = {"load_seconds": loads, "first_token_seconds": first_tokens}
    return {"device": chip, "bandwidth": bandwidth, **starts, **ended, "rows": rows}


def _of_all(times: dict[tuple[str, Workload], dict[str, list[float]]]) -> dict[Any, dict[str, list[float]]]:
    """Of each workload the rounds that all engines have done; without those of which there is none."""
    least = {key: min(map(len, figures.values())) for key, figures in times.items()}
    return {
        key: {name: seconds[: least[key]] for name, seconds in figures.items()}
        for key, figures in times.items()
        if least[key]
    }


def _turns(names: Sequence[str], repeats: int, alone: bool) -> list[tuple[Sequence[str], Sequence[int]]]:
    """Which engines are started together, one start after the other, and the rounds (from 1 on) they do then."""
    rounds = range(1, repeats + 1)
    return [([name], [number]) for number in rounds for name in names] if alone else [(names, rounds)]


def _memory(names: Sequence[str], plan: Plan, target: str) -> dict[str, dict[str, Any]]:
    """vLLM's options for the memory of each engine, so that all of `names` fit at once."""
    if target == "cpu":
        return {name: {} if name == "compiled" else {"kv_cache_memory_bytes": PEER_CACHE_BYTES} for name in names}
    total = gpu.detect().memory_bytes
    specs = {a.buffer: a.spec for name in ("forward", "logits") for a in plan.functions[name].weights}
    plain = sum(s.nbytes() for name, s in specs.items() if name not in plan.restored.values())
    needs = {name: plain + GPU_CACHE_BYTES for name in names}
    if "compiled" in needs:
        needs["compiled"] = sum(s.nbytes() for s in specs.values()) + GPU_CACHE_BYTES
    spare = max(GPU_SHARE * total - sum(needs.values()), 0) / len(needs)
    return {name: {"gpu_memory_utilization": round((need + spare) / total, 3)} for name, need in needs.items()}


def step_bytes(plan: Plan, batch: int, context: int) -> int:
    """Bytes a decode step must read: every stored weight but the tables, and the cached tokens."""
    entries = [plan.functions[name] for name in ("forward", "logits")]
    tables = {s.arguments[1].buffer for s in entries[0].steps if getattr(s, "op", None) == "embedding"}
    weights = {a.buffer: a.spec.nbytes() for f in entries for a in f.weights}
    read = sum(size for name, size in weights.items() if name not in tables and name not in plan.restored)
    model = plan.model
    cached = model.num_layers * model.num_kv_heads * model.cache_width * getattr(torch, model.dtype).itemsize
    return read + batch * context * cached


def _decode_step(engine: Engine, prompts: list[list[int]], steps: int) -> float:
    engine.seconds(prompts, 1)  # fills the prefix cache
    shorter = engine.seconds(prompts, 1 + steps)
    return (engine.seconds(prompts, 1 + 2 * steps) - shorter) / steps


def _prefill(engine: Engine, prompts: list[list[int]]) -> float:
    return engine.seconds(prompts, 1)


def _interleaved(
    engines: list[Engine],
    plan: Plan,
    rounds: Sequence[int],
    measure: Measure,
    kind: str,
    workload: Workload,
) -> Iterator[dict[str, float]]:
    """Seconds by engine in each of `rounds`, on random prompts that no other workload or round has.

    A round 0 before them warms up and is not counted.
    """
    for number in (0, *rounds):
        draw = random.Random(f"{kind} {workload} {number}")
        ids = range(plan.model.vocab_size)
        prompts = [draw.choices(ids, k=workload.length) for _ in range(workload.batch)]
        seconds = {engine.name: measure(engine, prompts) for engine in engines}
        if number:
            yield seconds


def _rows(
    kind: str, workload: Workload, times: dict[str, list[float]], plan: Plan, bandwidth: float, steps: int
) -> Iterator[Row]:
    for name, seconds in times.items():
        median = statistics.median(seconds)
        read = step_bytes(plan, workload.batch, workload.length + 3 * steps // 2) if kind == "decode" else 0
        tokens = workload.batch * (1 if kind == "decode" else workload.length)
        yield Row(
            engine=name,
            workload=kind,
            batch=workload.batch,
            length=workload.length,
            milliseconds=median * 1e3,
            quartiles=_quartiles([second * 1e3 for second in seconds]),
            tokens_per_second=tokens / median,
            gigabytes_per_second=read / median / 1e9,
            bandwidth_share=read / median / 1e9 / bandwidth,
            speedup=statistics.median(t / c for t, c in zip(seconds, times["compiled"], strict=True)),
        )


def _quartiles(times: list[float]) -> tuple[float, float]:
    if len(times) == 1:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


def _dummy_model(artifact: Path, plan: Plan, seed: int | None, scratch: Path, weightless: bool) -> Path:
    """The dummy checkpoint an artifact was compiled from, as a Hugging Face directory; or its config.json alone."""
    if seed is None:
        raise VllmCompileError("--model DIR is needed: the artifact does not hold the original weights")
    directory = scratch / "model"
    directory.mkdir()
    write_plain_config(artifact, directory)
    if weightless:
        return directory
    shapes = Reference.shapes(read_config(directory))
    checkpoint = DummyCheckpoint(shapes, getattr(torch, plan.model.dtype), seed)
    save_file({name: checkpoint.read(name) for name in shapes}, directory / "model.safetensors", {"format": "pt"})
    return directory
