"""Linear layers on this CPU, lossless and plain, against torch's F.linear (oneDNN) and a plain read of the weights.

    OMP_NUM_THREADS=2 python benchmarks/kernels_cpu_linear.py [--shapes qkv,down] [--tokens 1,8,1024]

Compiles here, then measures in a fresh process that has no TVM (whose thread pool would otherwise take the
place of OpenMP's).  Ours, torch's and the read take turns over copies of the weights that together exceed the
caches; medians.  The read is torch's sum of the plain weights as float32.  Lossless weights are bfloat16 only.
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


def build(path: Path, shape: tuple[int, int, bool], dtype: str, level: str) -> tuple[list, int]:
    """One library with a kernel for each variant of each kind; [symbol, least tokens, lossless, config] and lanes."""
    from vllm_compile.schedules.build import build_library
    from vllm_compile.schedules.cpu.gate_up import GateUpSilu
    from vllm_compile.schedules.cpu.linear import Linear
    from vllm_compile.spec import OpSpec, Sym, TensorSpec
    from vllm_compile.targets import cpu, resolve

    N, K, gated = shape
    levels = {"avx2": cpu.AVX2, "avx512": cpu.AVX2 | cpu.AVX512}
    target = cpu.for_features(levels[level]) if level in levels else resolve("cpu")
    family_of = GateUpSilu if gated else Linear
    inputs = (("x", TensorSpec((Sym.TOKENS, K), dtype)), ("weight", TensorSpec((N, K), dtype)))
    spec = OpSpec(family_of.op, inputs, (TensorSpec((Sym.TOKENS, N // (1 + gated)), dtype),))
    kernels, variants = {}, []
    for lossless in (False, True):
        family = family_of(packed=lossless)
        if family.serves(spec, target):
            for v in family.variants(spec, target):
                symbol = f"k{v.min_tokens}_{int(lossless)}"
                kernels[symbol] = family.build(spec, v.config, target)
                variants.append([symbol, v.min_tokens, lossless, dict(v.config)])
    build_library(kernels, target, path)
    return variants, target.vector_lanes


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
    from vllm_compile.schedules.lossless_panels import LosslessPanels

    module = tvm_ffi.load_module(case["path"])
    N, K, gated = case["shape"]
    plain = (torch.randn(N, K) * K**-0.5).to(getattr(torch, case["dtype"]))
    layouts = {False: Panels(case["lanes"], 2 if case["dtype"] == "bfloat16" else 1, gated)}
    if any(lossless for _, _, lossless, _ in case["variants"]):
        layouts[True] = LosslessPanels(case["lanes"], gated)
    copies = max(1, -(-(256 << 20) // plain.nbytes))
    ours = {kind: [mapped(layout.pack(plain), case["huge"])] for kind, layout in layouts.items()}
    for copied in ours.values():
        copied.extend(mapped(copied[0], case["huge"]) for _ in range(copies - 1))
    theirs = [mapped(plain, case["huge"]) for _ in range(copies)]
    turn = iter(range(1 << 40))

    def reference(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, w)
        return F.silu(y[:, : N // 2]) * y[:, N // 2 :] if gated else y

    for tokens in case["tokens"]:
        chosen = {
            kind: max(v[1:] + v[:1] for v in case["variants"] if v[2] == kind and v[1] <= tokens) for kind in ours
        }
        x = torch.randn(tokens, K).to(plain.dtype)
        out = torch.empty(tokens, N // (1 + gated), dtype=plain.dtype)
        repeats = max(5, case["repeats"] // (1 + tokens // 32))
        calls = {
            kind: lambda k=module[chosen[kind][-1]], w=ours[kind], x=x, out=out: k(x, w[next(turn) % copies], out)
            for kind in ours
        }
        *seconds, torch_seconds, read = medians(
            [
                *calls.values(),
                lambda x=x: reference(x, theirs[next(turn) % copies]),
                lambda: theirs[next(turn) % copies].view(-1).view(torch.float32).sum(),
            ],
            repeats,
        )
        for kind, taken in zip(calls, seconds, strict=True):
            config, moved = chosen[kind][2], ours[kind][0].nbytes
            print(
                f"{case['name']:8} {N:6} x {K:5} T={tokens:5} {'lossless' if kind else 'plain':8} "
                f"tile {config['rows']:2}x{config['panels']}: {taken * 1e3:9.3f} ms {moved / taken / 1e9:6.1f} GB/s, "
                f"{seconds[0] / taken:5.2f}x plain, {read / taken:4.2f}x a read of bf16, "
                f"{torch_seconds / taken:5.2f}x torch, {2 * tokens * N * K / taken / 1e9:7.1f} GFLOP/s",
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
            variants, lanes = build(path, SHAPES[name], options.dtype, options.level)
            case = {
                **{key: getattr(options, key) for key in ("dtype", "huge", "repeats")},
                **{"name": name, "shape": SHAPES[name], "lanes": lanes, "variants": variants},
                **{"path": str(path), "tokens": [int(count) for count in options.tokens.split(",")]},
            }
            subprocess.run([sys.executable, __file__, "--measure", json.dumps(case)], check=True)


if __name__ == "__main__":
    main()
