"""Times an artifact beside its peers: same weights, same prompts, interleaved, medians and quartiles.

Each engine lives in its own process and rests while another is timed; on a GPU they share its memory, unless it is too
small for all, or each is to have the machine to itself: then they take turns, started anew for each round, so that a
machine which changes meanwhile does so for all of them.

What they are asked for: bench_workloads.py.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .artifact import write_plain_config
from .bandwidth import read_bandwidth
from .bench_engine import Engine
from .bench_workloads import KINDS, Workload, interleaved, step_bytes, tokens_of
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
class Row:
    """One engine on one workload.

    Attributes:
        engine: compiled, vllm, vllm-eager or hf.
        workload: decode, prefill or serve.
        requests: how many of how many tokens in their prompts, as 63x128+1x30000; of those served, of prompts and
            answers at most.
        batch, length: all of them, and the longest's tokens.
        milliseconds: median time of a decode step, of the whole prefill, or until all are served.
        quartiles: half of the times are between these.  (The least of them, as of any difference, bounds nothing.)
        tokens_per_second: of all requests together; of those served, of their answers.
        gigabytes_per_second: bytes of weights and cache that a decode step must read, over its time; else 0.
        bandwidth_share: that over the measured read bandwidth.
        speedup: median over the repeats of (engine's time / compiled's time) in the same repeat.
    """

    engine: str
    workload: str
    requests: str
    batch: int
    length: int
    milliseconds: float
    quartiles: tuple[float, float]
    tokens_per_second: float
    gigabytes_per_second: float
    bandwidth_share: float
    speedup: float


def bench(
    artifact: Path,
    model: Path | None,
    against: Sequence[str],
    decodes: Sequence[Workload],
    prefills: Sequence[Workload],
    repeats: int,
    serves: Sequence[Workload] = (),
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
        serves: loads to time; as many requests run at a time as the largest decode or prefill has.
        alone: run one engine after the other instead of all at once, started anew for each repeat.
        steps: decode steps that are timed, after as many that are not; None for `DECODE_STEPS`.
    """
    manifest = read_manifest(artifact)
    plan = from_json((artifact / PLAN).read_text())
    target, device = manifest["target"]["name"], device_of(manifest["target"]["name"])
    if target != "cpu" and {"hf", "vllm-all-cores"} & set(against):
        raise VllmCompileError("on a GPU the peers are vllm and vllm-eager")
    if "hf" in against and any(len(set(w.lengths)) > 1 for w in (*decodes, *prefills)):
        raise VllmCompileError("hf runs requests of one length: leave it out of --against, or those of several")
    if serves and "hf" in against:
        raise VllmCompileError("hf runs requests of one length: leave it out of --against, or leave out --serve")
    bandwidth, steps = read_bandwidth(device), steps or DECODE_STEPS[target]
    most = plan.model.max_positions - 2 * steps - 1
    if most < 1:
        raise VllmCompileError(f"{artifact} has {plan.model.max_positions} positions, too few for --steps {steps}")
    # What is the same once it is no longer than the model is measured once.
    decodes, prefills = (
        list(dict.fromkeys(workload.within(most) for workload in workloads)) for workloads in (decodes, prefills)
    )
    serves = list(dict.fromkeys(workload.within(plan.model.max_positions // 2) for workload in serves))
    lengths = [max(w.lengths) + 2 * steps for w in (*decodes, *prefills)] + [2 * w.length for w in serves]
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        seed = manifest["source"]["dummy_weights_seed"]
        weightless = not list(artifact.glob("*.safetensors"))
        progress("preparing the model that the peers load")
        peer = model if model is not None and seed is None else _dummy_model(artifact, plan, seed, scratch, weightless)
        options = {
            "max_model_len": min(max(lengths) + 1, plan.model.max_positions),
            "max_num_seqs": max(len(w.lengths) for w in (*decodes, *prefills)),
            **({"load_format": "dummy"} if weightless else {}),
        }
        names = ("compiled", *against)
        of_kinds = zip(KINDS, (decodes, prefills, serves), strict=True)
        workloads = [(kind, workload) for kind, workloads in of_kinds for workload in workloads]
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
                    for kind, workload in workloads:
                        progress(f"{kind}, {workload}")
                        so_far = times.setdefault((kind, workload), {name: [] for name in names})
                        for seconds in interleaved(engines, plan.model.vocab_size, rounds, kind, workload, steps):
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


def _rows(
    kind: str, workload: Workload, times: dict[str, list[float]], plan: Plan, bandwidth: float, steps: int
) -> Iterator[Row]:
    for name, seconds in times.items():
        median = statistics.median(seconds)
        contexts = [length + 3 * steps // 2 for length in workload.lengths]
        read = step_bytes(plan, contexts) if kind == "decode" else 0
        yield Row(
            engine=name,
            workload=kind,
            requests=str(workload),
            batch=len(workload.lengths),
            length=max(workload.lengths),
            milliseconds=median * 1e3,
            quartiles=_quartiles([second * 1e3 for second in seconds]),
            tokens_per_second=tokens_of(kind, workload) / median,
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
