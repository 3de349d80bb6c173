"""`python -m tests.analysis.cpu_steps CONFIG ARTIFACT lossless|none`: steps, predicted and measured, on one thread.

Probe and steps take turns, in CPU time, and the fastest of each counts: others may be at work on the machine.
Prints {"decode 1": [predicted, measured], "decode 8": ..., "prefill 1": ...} in milliseconds.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from vllm_compile.analysis.analyze import analyze
from vllm_compile.analysis.probe import measure_cpu
from vllm_compile.paged_batch import PagedBatch
from vllm_compile.runtime.program import load
from vllm_compile.targets import Chip, resolve

CONTEXT = 256
BATCH = 8
ROUNDS = 2
REPEATS = {"decode 1": 10, "decode 8": 5, "prefill 1": 3}


def better(a: Chip, b: Chip) -> Chip:
    """The best that two probes of a CPU saw."""
    bandwidth = max(a.bandwidth, b.bandwidth)
    matrix = {dtype: max(rate, b.matrix[dtype]) for dtype, rate in a.matrix.items()}
    return replace(
        a,
        bandwidth=bandwidth,
        sustained_bandwidth=bandwidth,
        matrix=matrix,
        sustained_matrix=matrix,
        vector=max(a.vector, b.vector),
        launch=min(a.launch, b.launch),
    )


def main(config: Path, artifact: Path, pack: str) -> None:
    target = resolve("cpu")
    program = load(artifact, weights=False)
    program.load_dummy_weights()
    program.prepare(CONTEXT, BATCH)
    requests = {count: PagedBatch(program.plan.model, [CONTEXT + 1] * count) for count in (1, BATCH)}
    for batch in requests.values():
        for kv in batch.kv:
            kv.normal_()
    arguments = {
        "decode 1": (1, 1, requests[1].step([CONTEXT], [CONTEXT + 1])),
        "decode 8": (BATCH, BATCH, requests[BATCH].step([CONTEXT] * BATCH, [CONTEXT + 1] * BATCH)),
        "prefill 1": (1, CONTEXT, requests[1].step([0], [CONTEXT])),
    }
    ids = torch.zeros(CONTEXT, dtype=torch.int32)
    measured = dict.fromkeys(arguments, float("inf"))
    chip = measure_cpu(target, time.process_time)
    for _ in range(ROUNDS):
        chip = better(chip, measure_cpu(target, time.process_time))
        for what, (count, tokens, step) in arguments.items():
            for _ in range(REPEATS[what]):
                began = time.process_time()
                hidden = program.forward(ids[:tokens], kv=requests[count].kv, **step)
                program.logits(hidden[-count:])
                measured[what] = min(measured[what], time.process_time() - began)
    steps = analyze(config, "cpu", [1, BATCH], [CONTEXT], chip, pack=pack).steps
    predicted = {f"{step.phase} {step.batch}": step.predicted_ms for step in steps}
    print(json.dumps({what: [predicted[what], seconds * 1e3] for what, seconds in measured.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
