"""Linear layers on this CPU against torch's F.linear (oneDNN) and a plain read of the weights.

    OMP_NUM_THREADS=2 python benchmarks/kernels_cpu_linear.py [--shapes qkv,down] [--tokens 1,8,1024]

Compiles here, then measures in a fresh process that has no TVM (whose thread pool would otherwise take the
place of OpenMP's).  Ours, torch's and the read take turns over copies of the weights that together exceed the
caches; medians.  The read is torch's sum of the packed weights as float32.
With OMP_NUM_THREADS=1 it counts CPU time instead, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import json
import mmap
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

# Llama-3.2-1B: N, K, gated.
SHAPES = {
    "qkv": (3072, 2048, False),
    "o": (2048, 2048, False),
    "gate_up": (16384, 2048, True),
    "down": (2048, 8192, False),
    "lm_head": (128256, 2048, False),
}
HUGE_PAGE = 2 << 20


def build(path: Path, shape: tuple[int, int, bool], dtype: str, level: str) -> tuple[list, list]:
    """One library with a kernel k<min_tokens> per variant; [min_tokens, config] of each, and the layout."""
    from vllm_compile.schedules.build import build_library
    from vllm_compile.schedules.cpu.gate_up import GateUpSilu
    from vllm_compile.schedules.cpu.linear import Linear
    from vllm_compile.spec import OpSpec, Sym, TensorSpec
    from vllm_compile.targets import cpu, resolve

    N, K, gated = shape
    levels = {"avx2": cpu.AVX2, "avx512": cpu.AVX2 | cpu.AVX512}
    target = cpu.for_features(levels[level]) if level in levels else resolve("cpu")
    family = GateUpSilu() if gated else Linear()
    inputs = (("x", TensorSpec((Sym.TOKENS, K), dtype)), ("weight", TensorSpec((N, K), dtype)))
    spec = OpSpec(family.op, inputs, (TensorSpec((Sym.TOKENS, N // (1 + gated)), dtype),))
    variants = family.variants(spec, target)
    kernels = {f"k{v.min_tokens}": family.build(spec, v.config, target) for v in variants}
    build_library(kernels, target, path)
    layout = family.layouts(spec, target)["weight"]
    return [[v.min_tokens, dict(v.config)] for v in variants], [layout.lanes, layout.pair, gated]


def mapped(tensor: torch.Tensor, huge: bool) -> torch.Tensor:
    """A copy in memory of its own, in pages of 2 MiB if `huge`."""
    memory = mmap.mmap(-1, tensor.nbytes + HUGE_PAGE)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    first = -raw.data_ptr() % HUGE_PAGE
    return raw[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def medians(functions, repeats: int) -> list[float]:
    """Median seconds of each function, taking turns."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, record in zip(functions, times, strict=True):
            begin = clock()
            function()
            record.append(clock() - begin)
    return [sorted(record[1:])[repeats // 2] for record in times]


def measure(case: dict) -> None:
    import tvm_ffi

    from vllm_compile.schedules.layouts import Panels

    module = tvm_ffi.load_module(case["path"])
    N, K, gated = case["shape"]
    plain = (torch.randn(N, K) * K**-0.5).to(getattr(torch, case["dtype"]))
    packed = Panels(*case["layout"]).pack(plain)
    copies = max(1, -(-(256 << 20) // packed.nbytes))
    ours, theirs = ([mapped(w, case["huge"]) for _ in range(copies)] for w in (packed, plain))
    turn = iter(range(1 << 40))

    def reference(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, w)
        return F.silu(y[:, : N // 2]) * y[:, N // 2 :] if gated else y

    for tokens in case["tokens"]:
        minimum, config = max((v for v in case["variants"] if v[0] <= tokens), key=lambda v: v[0])
        kernel = module[f"k{minimum}"]
        x = torch.randn(tokens, K).to(plain.dtype)
        out = torch.empty(tokens, N // (1 + gated), dtype=plain.dtype)
        repeats = max(5, case["repeats"] // (1 + tokens // 32))
        seconds, torch_seconds, read = medians(
            [
                lambda k=kernel, x=x, out=out: k(x, ours[next(turn) % copies], out),
                lambda x=x: reference(x, theirs[next(turn) % copies]),
                lambda: ours[next(turn) % copies].view(-1).view(torch.float32).sum(),
            ],
            repeats,
        )
        print(
            f"{case['name']:8} {N:6} x {K:5} T={tokens:5} tile {config['rows']:2}x{config['panels']}: "
            f"{seconds * 1e3:9.3f} ms {packed.nbytes / seconds / 1e9:6.1f} GB/s "
            f"({read / seconds:5.0%} of a read) {2 * tokens * N * K / seconds / 1e9:7.1f} GFLOP/s "
            f"torch {torch_seconds * 1e3:9.3f} ms {torch_seconds / seconds:5.2f}x",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", default="1,8,1024")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--level", default="host", choices=["avx2", "avx512", "host"])
    parser.add_argument("--huge", action="store_true", help="weights in pages of 2 MiB")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(json.loads(options.measure))
        return
    print(f"{options.dtype} {options.level} threads={torch.get_num_threads()} huge={options.huge}", flush=True)
    for name in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "linear.so"
            variants, layout = build(path, SHAPES[name], options.dtype, options.level)
            case = {
                **{key: getattr(options, key) for key in ("dtype", "huge", "repeats")},
                **{"name": name, "shape": SHAPES[name], "layout": layout, "variants": variants},
                **{"path": str(path), "tokens": [int(count) for count in options.tokens.split(",")]},
            }
            subprocess.run([sys.executable, __file__, "--measure", json.dumps(case)], check=True)


if __name__ == "__main__":
    main()
