"""Linear layers that were tuned for a GPU: the tuned kernels, the hand-picked ones, and cuBLASLt, in one run.

    vllm-compile tune --model DIR --target h200 --build CANDIDATES      # needs TVM and nvcc, no GPU
    vllm-compile tune --measure CANDIDATES --db tuning.db               # needs a GPU, torch and apache-tvm-ffi, no TVM
    python benchmarks/tuned_cuda_linear.py CANDIDATES --db tuning.db    # on the same machine

For each linear layer of the model and each range of tokens it prints a row of a markdown table, measured at the most
tokens of the range.  Hand-picked is what `compile` takes without a database (schedules/cuda/records.json, else by a
rule), tuned what it takes with this one; cuBLASLt is torch's F.linear on the plain weight and what follows it
(kernels_cuda_linear.py).  Where a record says that cuBLASLt is faster there is no kernel of ours to tune.

Calls are captured into CUDA graphs that go through copies of the weight of 400 MB or more in all, several times over;
the medians of 15 replays, in turns, are divided by the number of calls.  TB/s counts the bytes of the weight as the
tuned kernel reads it; the share is that of the GPU's --bandwidth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

import torch
from kernels_cuda_linear import BUCKETS, DEVICE, Kernels, cold_weights, cublas_of, extras, median_us

from vllm_compile.canonical import canonical
from vllm_compile.errors import DatabaseError
from vllm_compile.runtime.manifest import LIBRARY
from vllm_compile.schedules.database import Database, Fingerprint, Record, lookup, open_database
from vllm_compile.schedules.tuning.built import built
from vllm_compile.schedules.tuning.device import GRAPH_CALLS
from vllm_compile.schedules.tuning.inputs import spec_of
from vllm_compile.schedules.tuning.measure import CASE
from vllm_compile.schedules.tuning.task import Range, Task
from vllm_compile.spec import OpSpec

HEAD = (
    "layer",
    "weight",
    "tokens",
    "cuBLASLt µs",
    "hand-picked µs",
    "tuned µs",
    "hand-picked / tuned",
    "cuBLASLt / tuned",
    "TB/s",
)


@dataclass(frozen=True)
class Contest:
    """Attributes:
    tokens: the least and the most of the range.
    hand_picked, tuned: symbols of kernels; empty where cuBLASLt serves the range, or the database has no record of it.
    """

    tokens: tuple[int, int]
    hand_picked: str = ""
    tuned: str = ""


class BuiltKernels(Kernels):
    """Those of a task that `tune --build` has built."""

    def __init__(self, task: Task) -> None:
        super().__init__(Path(task.built) / LIBRARY, json.loads((Path(task.built) / CASE).read_text())["configs"])


def contests(task: Task, configs: dict[str, object], database: Database, machine: Fingerprint) -> Iterator[Contest]:
    """Of each range of tokens."""
    symbols = {canonical(config): symbol for symbol, config in configs.items()}

    def is_built(record: Record) -> bool:
        return canonical(record.schedule.content()["config"]) in symbols

    def tuned(wanted: Range) -> str:
        answer = lookup(database, wanted.workload, machine, usable=is_built)
        return "" if answer is None else symbols[canonical(answer.record.schedule.content()["config"])]

    ranges = {json.loads(wanted.workload.text)["tokens"][0]: wanted for wanted in task.ranges}
    for least, most in BUCKETS.items():
        wanted = ranges.get(least)
        picked = ("", "") if wanted is None else (symbols[canonical(wanted.configs[0])], tuned(wanted))
        yield Contest((least, most), *picked)


def times_us(kernels: Kernels, spec: OpSpec, tokens: int, symbols: Sequence[str], weights: Sequence) -> list[float]:
    """Microseconds of cuBLASLt's call and of these kernels'; weights are copies of one, plain and packed."""
    plain, packed = weights
    x = torch.randn(tokens, spec.input("weight").size(1), device=DEVICE).bfloat16()
    y = torch.empty(tokens, spec.outputs[0].size(1), device=DEVICE, dtype=torch.bfloat16)
    more = extras(spec, tokens)
    rounds = -(-GRAPH_CALLS // len(plain))
    runs = [cublas_of(spec, x, plain * rounds, more)]
    for symbol in symbols:
        copies = packed if kernels.configs[symbol]["lossless"] else plain
        named = [{"x": x, "weight": weight, **more} for weight in copies]
        bound = [kernels.bound(symbol, [*(tensors[name] for name, _ in spec.inputs), y]) for tensors in named]
        runs.append(lambda bound=bound: [call() for call in bound * rounds])
    return [time / (rounds * len(plain)) for time in median_us([kernels.graph(run) for run in runs])]


def rows(
    task: Task, kernels: Kernels, database: Database, machine: Fingerprint, bandwidth: float
) -> Iterator[tuple[str, dict[str, float]]]:
    """A row of the table for each range; and how many times faster the tuned kernel is than the two others."""
    spec = spec_of(json.loads(task.ranges[0].workload.text))
    N, K = spec.input("weight").shape
    called = " + ".join((spec.op, *(name for name in ("bias", "residual") if spec.has_input(name))))
    plain, packed = cold_weights(spec)
    for contest in contests(task, kernels.configs, database, machine):
        symbols = [symbol for symbol in dict.fromkeys((contest.hand_picked, contest.tuned)) if symbol]
        theirs, *ours = times_us(kernels, spec, contest.tokens[1], symbols, (plain, packed))
        us = dict(zip(symbols, ours, strict=True))
        least, most = contest.tokens
        cells = [f"{task.names[0]}: {called}", f"{N} x {K}", f"{least}-{most}", f"{theirs:.1f}"]
        cells.append(f"{us[contest.hand_picked]:.1f}" if contest.hand_picked else "cuBLASLt")
        gains = {}
        if contest.tuned:
            tuned = us[contest.tuned]
            gains = {"hand-picked": us[contest.hand_picked] / tuned, "cuBLASLt": theirs / tuned}
            rate = (packed if kernels.configs[contest.tuned]["lossless"] else plain)[0].nbytes / tuned / 1e6
            cells += [f"{tuned:.1f}", *(f"{gain:.2f}" for gain in gains.values())]
            cells.append(f"{rate:.2f} ({100 * rate / bandwidth:.0f} %)")
        yield _row([*cells, *[""] * (len(HEAD) - len(cells))]), gains


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `tune --build` made")
    parser.add_argument("--db", required=True, help="the tuning database")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="of the GPU's memory in TB/s (default: an H200's)")
    options = parser.parse_args()
    torch.manual_seed(0)
    tasks, machine = built(options.folder)
    print(f"{machine.device}, driver {machine.driver}, torch {torch.__version__}\n")
    print(_row(HEAD))
    print(_row(["---"] * len(HEAD)))
    found: list[dict[str, float]] = []
    with open_database(options.db, writable=False) as database:
        for task in tasks:
            for row, gains in rows(task, BuiltKernels(task), database, machine, options.bandwidth):
                print(row, flush=True)
                found += [gains] if gains else []
    if not found:
        raise DatabaseError(
            f"{options.db}: no records of {options.folder} on this machine; `tune --measure` makes them"
        )
    means = {name: exp(sum(log(gains[name]) for gains in found) / len(found)) for name in found[0]}
    told = ", ".join(f"{mean:.3f}x {name}" for name, mean in means.items())
    print(f"\nTuned kernels in the geometric mean of {len(found)} rows: {told}.")


if __name__ == "__main__":
    main()
