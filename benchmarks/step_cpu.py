"""Steps of compiled programs on this CPU, without an engine around them, taking turns: two ways to compile one model.

    OMP_NUM_THREADS=2 python benchmarks/step_cpu.py ARTIFACT ARTIFACT --decode 1x128,8x128 --prefill 1024

Medians.  GB/s counts all weights as they are stored, a table of embeddings too, of which a step reads a few rows;
beside it, what a plain read by torch gets, which has fewer loads in flight.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vllm_compile.bandwidth import read_bandwidth
from vllm_compile.paged_batch import PagedBatch
from vllm_compile.runtime.program import Program, load


def step_of(program: Program, requests: int, cached: int, new: int) -> Callable[[], None]:
    """One step, logits of each request included: `new` tokens of each behind `cached` ones."""
    batch = PagedBatch(program.plan.model, [cached + new] * requests)
    for kv in batch.kv:
        kv.normal_()
    arguments = batch.step([cached] * requests, [cached + new] * requests)
    ids = torch.zeros(requests * new, dtype=torch.int32)

    def run() -> None:
        program.logits(program.forward(ids, kv=batch.kv, **arguments)[new - 1 :: new])

    return run


def medians(steps: list[Callable[[], None]], repeats: int) -> list[float]:
    """Seconds of each, taking turns; the first turn is not counted."""
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats + 1):
        for step, taken in zip(steps, times, strict=True):
            began = time.perf_counter()
            step()
            taken.append(time.perf_counter() - began)
    return [statistics.median(taken[1:]) for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--decode", default="1x128,8x128", help="requests x cached tokens, comma-separated")
    parser.add_argument("--prefill", default="1024", help="tokens of a prompt, comma-separated")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    programs = [load(artifact) for artifact in options.artifacts]
    print(f"a plain read: {read_bandwidth(torch.device('cpu')):.1f} GB/s", flush=True)
    shapes = [(f"decode {shape}", *map(int, shape.split("x")), 1) for shape in options.decode.split(",") if shape]
    shapes += [(f"prefill {tokens}", 1, 0, int(tokens)) for tokens in options.prefill.split(",") if tokens]
    for name, requests, cached, new in shapes:
        repeats = options.repeats if new == 1 else max(3, options.repeats // 5)
        seconds = medians([step_of(program, requests, cached, new) for program in programs], repeats)
        for artifact, program, taken in zip(options.artifacts, programs, seconds, strict=True):
            rate = f"{program.weight_bytes() / taken / 1e9:6.1f} GB/s" if new == 1 else f"{new / taken:6.0f} tokens/s"
            print(f"{name:16} {artifact.name:24} {taken * 1e3:9.2f} ms {rate} {seconds[0] / taken:5.2f}x", flush=True)


if __name__ == "__main__":
    main()
