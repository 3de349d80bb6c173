"""Where the time of a decode step goes on a GPU: the step as a CUDA graph, whole, and without each of its kernels.

    python benchmarks/step_cuda.py ARTIFACT 1x128 16x128 15x200+1x32000   # requests x cached tokens; random weights

Kernels overlap (each is launched while the one before it ends), so that a profiler's durations do not add up; how much
sooner the step ends without a kernel does say what it costs.  Results are garbage then, times are not: no kernel's
work depends on values.  Medians of 30 replays.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from vllm_compile.bench_workloads import Workload
from vllm_compile.cli_values import pairs_of
from vllm_compile.paged_batch import PagedBatch
from vllm_compile.runtime.manifest import PLAN, read_manifest
from vllm_compile.runtime.plan import KernelStep, Plan, VendorCall, from_json, kernel_steps
from vllm_compile.runtime.program import Program

REPLAYS = 30
DEVICE = torch.device("cuda")


def without(plan: Plan, kernels: Collection[str]) -> Plan:
    """The plan less the steps that `name_of` calls so."""

    def kept(steps):
        return tuple(step for step in steps if not isinstance(step, KernelStep) or name_of(step) not in kernels)

    functions = {name: dataclasses.replace(f, steps=kept(f.steps)) for name, f in plan.functions.items()}
    return dataclasses.replace(plan, functions=functions)


def name_of(step: KernelStep) -> str:
    """`linear 6144 x 4096`: the operator, and the shape of its weight if a vendor's product could take it."""
    vendor = [part for part in step.large.steps if isinstance(part, VendorCall)] if step.large is not None else []
    weights = [dict(call.arguments)["weight"].spec for call in vendor if call.function == "linear"]
    return " ".join([step.op, *(f"{weight.size(0)} x {weight.size(1)}" for weight in weights)])


def counts(plan: Plan) -> Counter[str]:
    """How often each kernel is called in a step."""
    return Counter(name_of(step) for _, step in kernel_steps(plan.functions))


def step_graph(program: Program, contexts: Sequence[int]) -> torch.cuda.CUDAGraph:
    """One decode step of requests with so many cached tokens, each with a token of its own."""
    batch, lengths = len(contexts), [context + 1 for context in contexts]
    requests = PagedBatch(program.plan.model, lengths, DEVICE)
    for kv in requests.kv:
        kv.normal_()
    arguments = requests.step(list(contexts), lengths)
    same = torch.Generator(DEVICE).manual_seed(batch)  # tokens of one program as of the next
    ids = torch.randint(program.plan.model.vocab_size, [batch], dtype=torch.int32, device=DEVICE, generator=same)

    def run() -> None:
        program.greedy(program.logits(program.forward(ids, kv=requests.kv, **arguments)))

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def step_us(program: Program, contexts: Sequence[int], replays: int = REPLAYS) -> float:
    """Microseconds of one step (`step_graph`): the median of replays, each by itself."""
    graph, times = step_graph(program, contexts), []
    for _ in range(3 + replays):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) * 1e3)
    return statistics.median(times[3:])


def sustained_us(program: Program, contexts: Sequence[int], seconds: float = 1.0) -> float:
    """Microseconds of one step (`step_graph`), of those that follow each other for so long, less the first third.

    By then a GPU that would draw more power than it may has lowered its clock.
    """
    graph = step_graph(program, contexts)

    def replayed(count: int) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(count):
            graph.replay()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) * 1e3 / count

    third = max(int(seconds * 1e6 / 3 / replayed(10)), 1)
    replayed(third)
    return replayed(2 * third)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("workloads", nargs="+", metavar="BxN[+BxN..]")
    options = parser.parse_args()
    workloads = [Workload.of(pairs_of(text)).lengths for text in options.workloads]
    manifest, plan = read_manifest(options.artifact), from_json((options.artifact / PLAN).read_text())
    program = Program(options.artifact, plan, manifest)
    program.load_dummy_weights()
    whole = [step_us(program, workload) for workload in workloads]
    print(f"{torch.cuda.get_device_name()}, microseconds a call\n")
    print(f"| kernel | calls | {' | '.join(options.workloads)} |\n|---|---|{'---|' * len(workloads)}")
    print(f"| whole step | | {' | '.join(f'{us:.0f}' for us in whole)} |", flush=True)
    for name, calls in counts(plan).items():
        program.set_plan(without(plan, [name]))
        costs = [(us - step_us(program, workload)) / calls for us, workload in zip(whole, workloads, strict=True)]
        print(f"| {name} | {calls} | {' | '.join(f'{us:.1f}' for us in costs)} |", flush=True)


if __name__ == "__main__":
    main()
