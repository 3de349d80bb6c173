"""The fastest configuration of our linear kernels for each call of a compiled model, found by trying them on a GPU.

    python benchmarks/search_cuda_linear.py build DIR    # needs TVM and nvcc, no GPU
    python benchmarks/search_cuda_linear.py run DIR      # needs a GPU, torch and apache-tvm-ffi, no TVM

`run` times every promising configuration as kernels_cuda_linear.py times kernels, with fewer replays, and writes the
fastest for each call as a record into schedules/cuda/records.json; one that gives a wrong result is named and left out.
--models, --layouts and --buckets take some of the models, of the layouts of the weight, and of the numbers of tokens.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from kernels_cuda_linear import (
    BUCKETS,
    KINDS,
    MODELS,
    Kernels,
    build_configs,
    cold_weights,
    compiled_calls,
    cublas_of,
    extras,
    median_us,
    reference,
    symbol,
)

from vllm_compile.spec import OpSpec

REPLAYS = 5
RECORDS = Path(__file__).parents[1] / "schedules/cuda/records.json"


def build_search(folder: Path, models: Sequence[str], layouts: Sequence[str], buckets: Sequence[int]) -> None:
    """A library for each call with every promising configuration."""
    from vllm_compile.schedules.cuda import matmul
    from vllm_compile.targets import cuda

    target = cuda.detect()
    pending = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for spec in compiled_calls(models):
            for kind in layouts:
                configs = {}
                for least in buckets:
                    promising = matmul.promising(spec, target, KINDS[kind], least, gated=spec.op == "gate_up_silu")
                    for i, config in enumerate(promising):
                        configs[symbol(spec, kind, f"{least}_{i}")] = (spec, config)
                pending.append(pool.submit(build_configs, folder / f"search_{symbol(spec, kind, 'all')}.so", configs))
    for made in pending:
        made.result()  # raises what went wrong


def search(folder: Path, spec: OpSpec, layouts: Sequence[str], buckets: Sequence[int]) -> list[dict[str, Any]]:
    """A record for each variant of one call: the fastest configuration for as many tokens as it is made for."""
    N, K = spec.input("weight").shape
    plain, packed = cold_weights(spec)
    found = []
    weights_of = {"plain": plain, "lossless": packed}
    libraries = {kind: Kernels(folder / f"search_{symbol(spec, kind, 'all')}.so") for kind in layouts}
    for least in buckets:
        tokens = BUCKETS[least]
        x = torch.randn(tokens, K, device="cuda").bfloat16()
        more = extras(spec, tokens)
        wanted, allowed = reference(spec, x, plain[0], more)
        y = torch.empty(tokens, spec.outputs[0].size(1), device="cuda", dtype=torch.bfloat16)
        for kind, kernels in libraries.items():
            weights = weights_of[kind]
            graphs = {"cublas": kernels.graph(cublas_of(spec, x, plain, more))}
            for name in kernels.configs:
                if not name.startswith(symbol(spec, kind, f"{least}_")):
                    continue
                bound = [kernels.bound(name, [x, weight, *more.values(), y]) for weight in weights]
                y.fill_(float("nan"))
                graph = kernels.graph(lambda bound=bound: [call() for call in bound])
                if bool(((y.double() - wanted).abs() <= allowed).all()):
                    graphs[name] = graph
                else:
                    print(f"wrong: {name} {kernels.configs[name]}", flush=True)
            times = dict(zip(graphs, median_us(list(graphs.values()), REPLAYS), strict=True))
            cublas_us = times.pop("cublas") / len(plain)
            if not times:
                continue
            best = min(times, key=times.__getitem__)
            found.append(
                {
                    "op": spec.op,
                    "N": N,
                    "K": K,
                    "residual": spec.has_input("residual"),
                    "lossless": KINDS[kind],
                    "min_tokens": least,
                    "config": kernels.configs[best],
                    "us": round(times[best] / len(plain), 2),
                    "cublas_us": round(cublas_us, 2),
                }
            )
            ranking = sorted(times, key=times.__getitem__)[:4]
            shown = ", ".join(f"{times[n] / len(plain):.1f} {list(kernels.configs[n].values())[1:-1]}" for n in ranking)
            print(f"{symbol(spec, kind, least)}: cuBLAS {cublas_us:.1f}; {len(times)} configs: {shown}", flush=True)
    return found


def write_records(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """Records, one a line; those of other calls stay."""
    names = ("op", "N", "K", "residual", "lossless", "min_tokens")
    old = json.loads(path.read_text()) if path.exists() else []
    merged = {tuple(record[name] for name in names): record for record in (*old, *found)}
    lines = ",\n".join(json.dumps(merged[key]) for key in sorted(merged))
    path.write_text(f"[\n{lines}\n]\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["build", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layouts", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--buckets", nargs="+", type=int, choices=BUCKETS, default=list(BUCKETS), help="least tokens")
    parser.add_argument("--records", type=Path, default=RECORDS, help="where `run` writes")
    options = parser.parse_args()
    if options.step == "build":
        return build_search(options.folder, options.models, options.layouts, options.buckets)
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    found = []
    for spec in compiled_calls(options.models):
        found += search(options.folder, spec, options.layouts, options.buckets)
        write_records(options.records, found)
    return None


if __name__ == "__main__":
    main()
