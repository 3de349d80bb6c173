"""The fastest configuration of our linear kernels for each call of a compiled model, found by trying them in its step.

    python benchmarks/search_cuda_linear.py build ARTIFACT DIR    # needs TVM and nvcc, no GPU
    python benchmarks/search_cuda_linear.py run ARTIFACT DIR      # needs a GPU, torch and apache-tvm-ffi, no TVM

Kernels overlap with those before and after them, and compete for shared memory and the L2 cache; so a configuration is
worth what the whole decode step costs with it (step_cuda.py), of which all else stays as it is.  `run` goes through the
calls of the model, the largest weights first, and keeps the best before it turns to the next; each kernel's result is
compared with float64 before.  All are timed by themselves; those that come within a quarter of the fastest for a few
steps; then the best of each of eight shapes (--finalists) for a second, in which the GPU comes to draw as much power as
it may: of kernels that are as fast at first, the one that takes less energy wins.  The fastest are written as records
into schedules/cuda/records.json; what gives a wrong result is named and left out.  --buckets takes some of the numbers
of tokens, --missing (of both steps) what has no record yet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kernels_cuda_linear import (
    BUCKETS,
    Kernels,
    build_configs,
    cold_weights,
    extras,
    median_us,
    reference,
    spec_of,
    symbol,
)
from step_cuda import step_us, sustained_us

from vllm_compile import lossless
from vllm_compile.runtime.manifest import PLAN, read_manifest
from vllm_compile.runtime.plan import KernelStep, Plan, VendorCall, from_json, kernel_steps
from vllm_compile.runtime.program import Program
from vllm_compile.spec import OpSpec
from vllm_compile.targets import cuda
from vllm_compile.whole_file import write_whole

CONTEXT = 128  # cached tokens of each request
BATCHES = {1: (1, 8), 9: (16,), 17: (32,), 33: (64,)}  # by least tokens of a variant: the steps that are timed
KEY = ("chip", "op", "N", "K", "residual", "lossless", "min_tokens")  # of a record: what it is found by
# Of a configuration: which rows and columns it takes.
SHAPE = ("kind", "row_tiles", "row_groups", "tiles", "k_groups", "cluster", "splits")
ALONE = 1.25  # times as long as the fastest by itself: a kernel that takes longer has hardly a chance in a step
FINALISTS = 8  # shapes that are timed for a second
RECORDS = Path(__file__).parents[1] / "schedules/cuda/records.json"


@dataclass(frozen=True)
class LinearCall:
    """A linear kernel of a plan: its call, whether its weight is lossless, the step, and how often a step has it."""

    spec: OpSpec
    packed: bool
    step: KernelStep
    count: int

    @property
    def name(self) -> str:
        return symbol(self.spec, "lossless" if self.packed else "plain", "from")


def linear_calls(plan: Plan) -> list[LinearCall]:
    """Those that a vendor's product could take, the largest weights first."""
    counted = Counter(step for _, step in kernel_steps(plan.functions))
    found = {}
    for step, count in counted.items():
        parts = step.large.steps if step.large is not None else ()
        for part in parts:
            if isinstance(part, VendorCall) and part.function == "linear":
                given = dict(part.arguments)
                N, K = given["weight"].spec.size(0), given["weight"].spec.size(1)
                packed = any(argument.spec.dtype == "uint8" for argument in step.arguments)
                spec = spec_of(step.op, N, K, "residual" in given, "bias" in given)
                found[spec] = LinearCall(spec, packed, step, count)
    return sorted(found.values(), key=lambda call: -call.spec.input("weight").nbytes() * call.count)


def searched(
    plan: Plan, buckets: Sequence[int], known: Sequence[Mapping[str, Any]], chip: str
) -> list[tuple[LinearCall, int]]:
    """Calls and least numbers of tokens that are to be searched: those that no known record of this chip is of."""
    have = {tuple(record[name] for name in KEY) for record in known}
    return [
        (call, least)
        for least in buckets
        for call in linear_calls(plan)
        if tuple(identity(chip, call, least).values()) not in have
    ]


def identity(chip: str, call: LinearCall, least: int) -> dict[str, Any]:
    """What a record is found by."""
    N, K = call.spec.input("weight").shape
    found = (chip, call.spec.op, N, K, call.spec.has_input("residual"), call.packed, least)
    return dict(zip(KEY, found, strict=True))


def build(wanted: Sequence[tuple[LinearCall, int]], folder: Path) -> None:
    """A library for each call with every promising configuration."""
    from vllm_compile.schedules.cuda import matmul

    target = cuda.for_chip()
    pending = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for call, least in wanted:
            gated = call.spec.op == "gate_up_silu"
            promising = matmul.promising(call.spec, target, call.packed, least, gated)
            configs = {f"{call.name}_{least}_{i}": (call.spec, config) for i, config in enumerate(promising)}
            pending.append(pool.submit(build_configs, library(folder, call, least), configs))
    for made in pending:
        made.result()  # raises what went wrong


def library(folder: Path, call: LinearCall, least: int) -> Path:
    return folder / f"{call.name}_{least}.so"


class Candidates(Program):
    """A program that may also call kernels of other libraries."""

    def __init__(self, *program: Any, others: Mapping[str, Callable[..., None]]) -> None:
        self._others = others
        super().__init__(*program)

    def kernels(self) -> Callable[[str], Callable[..., None]]:
        own, others = super().kernels(), self._others
        return lambda name: others[name] if name in others else own(name)


def with_kernel(plan: Plan, spec: OpSpec, least: int, kernel: str | None) -> Plan:
    """The plan with this kernel as the variant from `least` tokens on for a call; None: a vendor's product."""
    (call,) = (call for call in linear_calls(plan) if call.spec == spec)
    large, variants = call.step.large, {minimum: s for minimum, s in call.step.variants if minimum != least}
    assert large is not None
    if kernel is None:
        kept = tuple((minimum, s) for minimum, s in call.step.variants if minimum < least)
        changed = replace(call.step, variants=kept, large=replace(large, min_tokens=least))
    else:
        variants[least] = kernel
        large = replace(large, min_tokens=max(large.min_tokens, BUCKETS[least] + 1))
        changed = replace(call.step, variants=tuple(sorted(variants.items())), large=large)
    functions = {
        name: replace(f, steps=tuple(changed if step == call.step else step for step in f.steps))
        for name, f in plan.functions.items()
    }
    return replace(plan, functions=functions)


def right(call: LinearCall, least: int, kernels: Kernels) -> list[str]:
    """The kernels whose result is within the error allowed, on poisoned outputs."""
    N, K = call.spec.input("weight").shape
    weight = (torch.randn(N, K, device="cuda") * 0.02).bfloat16()
    x = torch.randn(BUCKETS[least], K, device="cuda").bfloat16()
    more = extras(call.spec, BUCKETS[least])
    wanted, allowed = reference(call.spec, x, weight, more)
    y = torch.empty(BUCKETS[least], call.spec.outputs[0].size(1), device="cuda", dtype=torch.bfloat16)
    kept = []
    for name, config in kernels.configs.items():
        y.fill_(float("nan"))
        with kernels.ffi.use_torch_stream():
            kernels.bound(name, [x, lossless.pack(weight) if call.packed else weight, *more.values(), y])()
        if bool(((y.double() - wanted).abs() <= allowed).all()):
            kept.append(name)
        else:
            print(f"wrong: {name} {config}", flush=True)
    return kept


def fast_alone(call: LinearCall, least: int, kernels: Kernels, names: Sequence[str]) -> list[str]:
    """Those of the kernels that take at most ALONE times as long as the fastest, each after its like, weights cold."""
    weights = cold_weights(call.spec)[call.packed]
    times = dict.fromkeys(names, 0.0)
    for tokens in BATCHES[least]:
        x = torch.randn(tokens, call.spec.input("weight").size(1), device="cuda").bfloat16()
        more = extras(call.spec, tokens)
        y = torch.empty(tokens, call.spec.outputs[0].size(1), device="cuda", dtype=torch.bfloat16)
        graphs = []
        for name in names:
            bound = [kernels.bound(name, [x, weight, *more.values(), y]) for weight in weights]
            graphs.append(kernels.graph(lambda bound=bound: [run() for run in bound]))
        for name, us in zip(names, median_us(graphs), strict=True):
            times[name] += us
    return [name for name, us in times.items() if us <= ALONE * min(times.values())]


def search(
    program: Candidates,
    call: LinearCall,
    least: int,
    names: Sequence[str],
    configs: Mapping[str, Any],
    most: int = FINALISTS,
) -> dict[str, Any]:
    """The record of the best of these kernels, which the program's plan has from now on; `most` are timed for long."""
    plan = program.plan

    def us(kernel: str | None, timed: Callable[[Program, Sequence[int]], float]) -> float:
        program.set_plan(with_kernel(plan, call.spec, least, kernel))
        return sum(timed(program, [CONTEXT] * batch) for batch in BATCHES[least])

    times = {name: us(name, partial(step_us, replays=5)) for name in names}
    slowest_first = sorted(times, key=times.__getitem__, reverse=True)
    of_shapes = {tuple(map(configs[name].get, SHAPE)): name for name in slowest_first}
    finalists = sorted(of_shapes.values(), key=times.__getitem__)[:most]
    finals = {name: us(name, sustained_us) for name in finalists}
    ranking = sorted(finals, key=finals.__getitem__)
    best = ranking[0]
    vendor = us(None, sustained_us)
    # A vendor's product cannot take over from the first token on: a plan has a kernel for that.
    kept = None if vendor < finals[best] and least > min(BATCHES) else best
    program.set_plan(with_kernel(plan, call.spec, least, kept))
    calls = call.count * len(BATCHES[least])
    shown = ", ".join(
        f"{(finals[n] - finals[best]) / calls:+.1f} (at first {(times[n] - times[best]) / calls:+.1f})"
        f" {list(configs[n].values())[:-1]}"
        for n in ranking[:6]
    )
    gain = (vendor - finals[best]) / calls
    print(f"{call.name} {least}: {len(names)} configs, cuBLAS {gain:+.1f}: {shown}", flush=True)
    return {**identity(chip(), call, least), "config": configs[best], "gain_us": round(gain, 2)}


def chip() -> str:
    """Which of the target's chips this machine has."""
    _, total = torch.cuda.mem_get_info()
    return cuda.chip_of(total)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a file, none if there is no such; ends the program with one line if they are of an older form."""
    records = json.loads(path.read_text()) if path.exists() else []
    for number, record in enumerate(records, 1):
        if missing := [name for name in KEY if name not in record]:
            sys.exit(
                f"{path}: record {number} has no {', '.join(missing)}, being of an older form: name another --records"
            )
    return records


def write_records(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Records, one a line; those of other calls stay, whoever has written them meanwhile."""
    merged = {tuple(record[name] for name in KEY): record for record in (*read_records(path), *found)}
    lines = ",\n".join(json.dumps(merged[key]) for key in sorted(merged))
    write_whole(path, f"[\n{lines}\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["build", "run"])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--buckets", nargs="+", type=int, choices=BUCKETS, default=list(BUCKETS), help="least tokens")
    parser.add_argument("--missing", action="store_true", help="only what --records has no record of")
    parser.add_argument("--finalists", type=int, default=FINALISTS, help="shapes timed for a second")
    parser.add_argument("--records", type=Path, default=RECORDS, help="where `run` writes")
    options = parser.parse_args()
    plan = from_json((options.artifact / PLAN).read_text())
    known = read_records(options.records)  # what cannot be added to is said before the search
    this = chip() if options.action == "run" else cuda.for_chip().chip
    wanted = searched(plan, options.buckets, known if options.missing else [], this)
    if options.action == "build":
        return build(wanted, options.folder)
    torch.manual_seed(0)
    found = {(call, least): Kernels(library(options.folder, call, least)) for call, least in wanted}
    others = {name: kernels.module[name] for kernels in found.values() for name in kernels.configs}
    program = Candidates(options.artifact, plan, read_manifest(options.artifact), others=others)
    program.load_dummy_weights()
    print(f"{torch.cuda.get_device_name()}; microseconds a call beside the best")
    records = []
    for least in options.buckets:
        for call in (call for call, other in wanted if other == least):
            kernels = found[call, least]
            if names := right(call, least, kernels):
                names = fast_alone(call, least, kernels, names)
                records.append(search(program, call, least, names, kernels.configs, options.finalists))
                write_records(options.records, records)
        steps = {batch: sustained_us(program, [CONTEXT] * batch) for batch in BATCHES[least]}
        print(f"from {least} tokens: steps of {steps} us", flush=True)
    return None


if __name__ == "__main__":
    main()
