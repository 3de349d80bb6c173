"""Paged attention on this CPU against torch's scaled_dot_product_attention on gathered, contiguous K and V.

    OMP_NUM_THREADS=2 python benchmarks/kernels_cpu_attention.py [--dtype bfloat16] [--head-dim 64]

Compiles here, then measures in a fresh process that has no TVM (whose thread pool would otherwise take the
place of OpenMP's).  Ours, torch's and a plain read of 512 MiB take turns; medians.  Decode: GB/s of K and V
read, and their share of the plain read's; prefill: GFLOP/s of the causal half.
With OMP_NUM_THREADS=1 it counts CPU time instead, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

DECODE = [(1, 128), (1, 1024), (1, 4096), (8, 1024), (8, 4096), (16, 4096)]
PREFILL = [(1, 256), (1, 1024), (1, 4096)]


def build(path: Path, shape: dict) -> None:
    """One library with the attention kernel `k`."""
    from vllm_compile.schedules.build import build_library
    from vllm_compile.schedules.cpu.attention import paged_attention
    from vllm_compile.schedules.cpu.attention_tile import Scores
    from vllm_compile.targets import cpu, resolve

    levels = {"avx2": cpu.AVX2, "avx512": cpu.AVX2 | cpu.AVX512}
    target = cpu.for_features(levels[shape["level"]]) if shape["level"] in levels else resolve("cpu")
    D = shape["head_dim"]
    keys, values = range(D), range(D, 2 * D)
    function = paged_attention(shape["heads"], shape["kv_heads"], keys, values, shape["dtype"], Scores(D**-0.5), target)
    build_library({"k": function}, target, path)


def case(requests: int, queries: int, context: int, shape: dict):
    """Arguments of the kernel, and q, k, v as torch's attention takes them."""
    D, N, H, KH = (shape[name] for name in ("head_dim", "block_size", "heads", "kv_heads"))
    dtype = getattr(torch, shape["dtype"])
    width = -(-context // N)
    q = torch.randn(requests * queries, H, D).to(dtype)
    kv = torch.randn(requests * width + 1, KH, N, 2 * D, dtype=dtype)
    table = torch.randperm(requests * width).add(1).int().view(requests, width)
    lengths = torch.full((requests,), context, dtype=torch.int32)
    starts = torch.arange(0, requests * queries + 1, queries, dtype=torch.int32)
    pages = kv[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :context]
    k, v = (half.contiguous() for half in pages.split(D, dim=-1))
    q_RHTD = q.view(requests, queries, H, D).transpose(1, 2).contiguous()
    return [q, kv, table, lengths, starts, torch.empty_like(q)], (q_RHTD, k, v)


def medians(functions, repeats: int) -> list[float]:
    """Median seconds of each function, taking turns."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = [[] for _ in functions]
    for _, (function, record) in itertools.product(range(repeats + 1), zip(functions, times, strict=True)):
        begin = clock()
        function()
        record.append(clock() - begin)
    return [sorted(record[1:])[repeats // 2] for record in times]


def measure(path: str, shape: dict, repeats: int) -> None:
    import tvm_ffi

    kernel = tvm_ffi.load_module(path)["k"]
    plain = torch.ones(1 << 27)
    D, H, KH = shape["head_dim"], shape["heads"], shape["kv_heads"]
    for requests, context in DECODE:
        arguments, tensors = case(requests, 1, context, shape)
        ours, theirs, read = medians(
            [
                lambda a=arguments: kernel(*a),
                lambda t=tensors: F.scaled_dot_product_attention(*t, enable_gqa=True),
                plain.sum,
            ],
            repeats,
        )
        size = requests * context * KH * 2 * D * arguments[0].element_size() / 1e9
        share = size / ours / (plain.nbytes / 1e9 / read)
        print(
            f"decode  {requests:3} x {context:5} tokens, {size * 1e3:6.1f} MB: {ours * 1e6:8.1f} us  "
            f"{size / ours:5.1f} GB/s ({share:4.0%} of a plain read)  torch {theirs * 1e6:9.1f} us  "
            f"{theirs / ours:5.2f}x",
            flush=True,
        )
    for requests, context in PREFILL:
        arguments, tensors = case(requests, context, context, shape)
        ours, theirs = medians(
            [
                lambda a=arguments: kernel(*a),
                lambda t=tensors: F.scaled_dot_product_attention(*t, is_causal=True, enable_gqa=True),
            ],
            max(3, repeats // 3),
        )
        flops = requests * H * D * 2 * context * (context + 1) / 1e9
        print(
            f"prefill {requests:3} x {context:5} tokens: {ours * 1e3:8.2f} ms  {flops / ours:6.0f} GFLOP/s  "
            f"torch {theirs * 1e3:8.2f} ms  {theirs / ours:5.2f}x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--level", default="host", choices=["avx2", "avx512", "host"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = {name: getattr(options, name) for name in ("dtype", "heads", "kv_heads", "head_dim", "block_size", "level")}
    if options.measure:
        measure(options.measure, shape, options.repeats)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attention.so"
        build(path, shape)
        print(json.dumps(shape), f"threads={torch.get_num_threads()}", flush=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure", str(path)], check=True)


if __name__ == "__main__":
    main()
