"""Times an artifact beside its peers: same weights, same prompts, interleaved, medians.

Each engine lives in its own process and idles while another is timed.  A decode step is the
difference between generating 1 + n tokens and generating 1, divided by n; prefill is what
generating one token takes.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .artifact import write_plain_config
from .errors import VllmCompileError
from .frontend.checkpoint import DummyCheckpoint
from .frontend.hf import read_config
from .reference import Reference
from .runtime.manifest import PLAN, read_manifest
from .runtime.plan import Plan, from_json

# By default vLLM keeps one core for its scheduler and computes on the others; on two cores that is one.
ENVIRONMENTS = {"vllm-all-cores": {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))}}
DECODE_CONTEXT = 128  # tokens in each prompt when decoding is timed
DECODE_STEPS = 32
PREFILL_TOKENS = 1024  # or half of the positions that the model has
MAX_MODEL_LEN = 2048


@dataclass(frozen=True)
class Row:
    """One engine on one workload.

    Attributes:
        engine: compiled, vllm, vllm-eager or hf.
        workload: decode or prefill.
        size: requests decoded at once, or tokens of the prompt.
        milliseconds: median time of a decode step, or of the whole prefill.
        tokens_per_second: of all requests together.
        gigabytes_per_second: bytes of weights and cache that a step must read, over its time; 0 for prefill.
        bandwidth_share: that over the measured read bandwidth.
        speedup: median over the repeats of (engine's time / compiled's time) in the same repeat.
    """

    engine: str
    workload: str
    size: int
    milliseconds: float
    tokens_per_second: float
    gigabytes_per_second: float
    bandwidth_share: float
    speedup: float


class Engine:
    """A worker process."""

    def __init__(self, name: str, model: Path, max_model_len: int, log: Path) -> None:
        self.name, self._log = name, log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_compile.bench_worker", name, str(model), str(max_model_len)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **ENVIRONMENTS.get(name, {})},
        )
        self.load_seconds = self._answer()["loaded"]

    def seconds(self, prompts: list[list[int]], new_tokens: int) -> float:
        """How long generating `new_tokens` tokens for each prompt takes."""
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "new_tokens": new_tokens}), file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = self._log.read_text().strip().splitlines()[-1:]
            raise VllmCompileError(f"engine {self.name} ended: {tail[0] if tail else 'no output'}")
        return json.loads(line)


def bench(
    artifact: Path,
    model: Path | None,
    against: Sequence[str],
    batches: Sequence[int],
    repeats: int,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Time `artifact` and its peers; returns {"bandwidth": GB/s, "load_seconds": {...}, "rows": [...]}.

    Args:
        artifact: what `compile` wrote.
        model: the Hugging Face directory it was made from; None for dummy weights, which are made again.
        against: names out of `bench_worker.PEERS`.
        batches: numbers of requests decoded at once.
        repeats: how often every engine does every workload.
    """
    manifest = read_manifest(artifact)
    plan = from_json((artifact / PLAN).read_text())
    bandwidth = read_bandwidth()
    rows: list[Row] = []
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        seed = manifest["source"]["dummy_weights_seed"]
        peer = model if model is not None and seed is None else _write_dummy(artifact, plan, seed, scratch)
        engines = []
        for name in ("compiled", *against):
            progress(f"starting {name}")
            directory = artifact if name == "compiled" else peer
            engine = Engine(name, directory, min(MAX_MODEL_LEN, plan.model.max_positions), scratch / f"{name}.log")
            stack.callback(engine.close)
            engines.append(engine)
        for batch in batches:
            progress(f"decode, batch {batch}")
            times = _interleaved(engines, plan, repeats, _decode_step, batch, DECODE_CONTEXT)
            rows += _rows("decode", batch, times, plan, bandwidth)
        length = min(PREFILL_TOKENS, plan.model.max_positions // 2)
        progress(f"prefill, {length} tokens")
        times = _interleaved(engines, plan, repeats, _prefill, 1, length)
        rows += _rows("prefill", length, times, plan, bandwidth)
        loads = {engine.name: engine.load_seconds for engine in engines}
    return {"bandwidth": bandwidth, "load_seconds": loads, "rows": rows}


def read_bandwidth(size: int = 1 << 30, repeats: int = 5) -> float:
    """GB/s at which torch reads memory on all cores: the best of several dot products over `size` bytes.

    A kernel that has more loads in flight can be faster.
    """
    data = torch.ones(2, size // 8)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        torch.dot(data[0], data[1])
        best = min(best, time.perf_counter() - began)
    return size / best / 1e9


def step_bytes(plan: Plan, batch: int, context: int) -> int:
    """Bytes a decode step must read: every weight but the embedding table, and the cached tokens."""
    entries = [plan.functions[name] for name in ("forward", "logits")]
    tables = {s.arguments[1].buffer for s in entries[0].steps if getattr(s, "op", None) == "embedding"}
    weights = {a.buffer: a.spec.nbytes() for f in entries for a in f.weights if a.buffer not in tables}
    model = plan.model
    cached = 2 * model.num_layers * model.num_kv_heads * model.head_dim * getattr(torch, model.dtype).itemsize
    return sum(weights.values()) + batch * context * cached


def _decode_step(engine: Engine, prompts: list[list[int]]) -> float:
    first = engine.seconds(prompts, 1)
    return (engine.seconds(prompts, 1 + DECODE_STEPS) - first) / DECODE_STEPS


def _prefill(engine: Engine, prompts: list[list[int]]) -> float:
    return engine.seconds(prompts, 1)


def _interleaved(
    engines: list[Engine],
    plan: Plan,
    repeats: int,
    measure: Callable[[Engine, list[list[int]]], float],
    batch: int,
    length: int,
) -> dict[str, list[float]]:
    """Seconds by engine, one figure per repeat, on `batch` random prompts of `length` tokens.

    The first round warms up and is not counted.
    """
    times: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for repeat in range(repeats + 1):
        draw = random.Random(repeat)
        prompts = [[draw.randrange(plan.model.vocab_size) for _ in range(length)] for _ in range(batch)]
        for engine in engines:
            seconds = measure(engine, prompts)
            if repeat:
                times[engine.name].append(seconds)
    return times


def _rows(workload: str, size: int, times: dict[str, list[float]], plan: Plan, bandwidth: float) -> Iterator[Row]:
    for name, seconds in times.items():
        median = statistics.median(seconds)
        read = step_bytes(plan, size, DECODE_CONTEXT + DECODE_STEPS // 2) if workload == "decode" else 0
        yield Row(
            engine=name,
            workload=workload,
            size=size,
            milliseconds=median * 1e3,
            tokens_per_second=size / median,
            gigabytes_per_second=read / median / 1e9,
            bandwidth_share=read / median / 1e9 / bandwidth,
            speedup=statistics.median(t / c for t, c in zip(seconds, times["compiled"], strict=True)),
        )


def _write_dummy(artifact: Path, plan: Plan, seed: int | None, scratch: Path) -> Path:
    """The dummy checkpoint an artifact was compiled from, as a Hugging Face directory."""
    if seed is None:
        raise VllmCompileError("--model DIR is needed: the artifact does not hold the original weights")
    directory = scratch / "model"
    directory.mkdir()
    write_plain_config(artifact, directory)
    shapes = Reference.shapes(read_config(directory))
    checkpoint = DummyCheckpoint(shapes, getattr(torch, plan.model.dtype), seed)
    save_file({name: checkpoint.read(name) for name in shapes}, directory / "model.safetensors", {"format": "pt"})
    return directory
