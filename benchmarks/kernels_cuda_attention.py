"""Attention of prompts on a GPU: our kernel, which serves prompts within windows, beside vLLM's FlashAttention 3.

    python benchmarks/kernels_cuda_attention.py build DIR       # needs TVM and nvcc, no GPU
    python benchmarks/kernels_cuda_attention.py measure DIR     # needs a Hopper GPU, vLLM and apache-tvm-ffi, no TVM

Heads, windows and caps are those of models; FlashAttention runs without the window, which it is wrong with (vLLM 0.26).
So only rows without one compare the two, in their results, too.  Blocks of 16 tokens, in random order.  Medians of 15
replays of a CUDA graph of 4 calls, taking turns.  TFLOP/s counts 4 * H * D operations for each pair of a query and a
token that it sees; the share is that of 989 TFLOP/s, an H100's and H200's by their datasheets.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from kernels_cuda_linear import Kernels, median_us

from vllm_compile.runtime import vendor
from vllm_compile.spec import OpSpec, Sym, TensorSpec

PEAK_TFLOPS = 989
BLOCK_SIZE, CALLS = 16, 4
ROUNDING = 2.0**-6  # of results to bf16, and of probabilities, relative to the largest value


@dataclass(frozen=True)
class Heads:
    """Of a model's layer: query heads, KV heads, head size; 0 is no window, no cap."""

    query: int
    kv: int
    size: int
    window: int = 0
    soft_cap: float = 0.0

    @property
    def symbol(self) -> str:
        return "_".join(map(str, ("prompts", self.query, self.kv, self.size, self.window, int(self.soft_cap))))

    def spec(self) -> OpSpec:
        """Calls of the operator, for prompts."""
        q = TensorSpec((Sym.TOKENS, self.query, self.size), "bfloat16")
        kv = TensorSpec((Sym.BLOCKS, self.kv, Sym.BLOCK_SIZE, 2 * self.size), "bfloat16", strided=True)
        inputs = (
            ("q", q),
            ("kv", kv),
            ("block_table", TensorSpec((Sym.REQUESTS, Sym.TABLE_WIDTH), "int32")),
            ("seq_lens", TensorSpec((Sym.REQUESTS,), "int32")),
            ("query_start_loc", TensorSpec((Sym.BOUNDARIES,), "int32")),
        )
        options = {"prompts": 1, "window": self.window, "soft_cap": self.soft_cap}
        given = {name: value for name, value in options.items() if value}
        attributes = tuple(sorted((given | {"scale": self.size**-0.5}).items()))
        return OpSpec("paged_attention", inputs, (q,), attributes, frozenset(given))


MODELS = {
    "Llama-3.1-8B": Heads(32, 8, 128),
    "Mistral-7B-v0.1": Heads(32, 8, 128, 4096),
    "Phi-3-mini": Heads(32, 32, 96, 2047),
    "Gemma-2-9B": Heads(16, 8, 256, 4096, 50.0),
    "Gemma-3-4B": Heads(8, 4, 256, 1024),
}
STEPS = {  # (queries, cached tokens) of each request
    "1 x 8192": ((8192, 8192),),
    "4 x 4096": ((4096, 4096),) * 4,
    "2048 behind 14336": ((2048, 16384),),
    "2048, 63 decode at 4000": ((2048, 2048), *((1, 4000),) * 63),
}


def build(folder: Path) -> None:
    """One library with a kernel for each model."""
    from vllm_compile.schedules.cuda.build import build_library
    from vllm_compile.schedules.select import choose
    from vllm_compile.targets import cuda

    target, kernels = cuda.for_chip(), {}
    for heads in MODELS.values():
        choice = choose(heads.spec(), target)
        kernels[heads.symbol] = choice.family.build(heads.spec(), choice.variants[0].config, target)
    folder.mkdir(parents=True, exist_ok=True)
    print(build_library(kernels, target, folder / "kernels.so"))


def pairs(requests: Sequence[tuple[int, int]], window: int) -> int:
    """Pairs of a query and a token that it sees."""
    visible = (range(length - queries + 1, length + 1) for queries, length in requests)
    return sum(min(seen, window or seen) for request in visible for seen in request)


def inputs_of(heads: Heads, requests: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Random queries, keys and values; blocks in random order."""
    width = max(-(-length // BLOCK_SIZE) for _, length in requests)
    starts = torch.tensor([0, *(queries for queries, _ in requests)]).cumsum(0).int()
    blocks = torch.randperm(len(requests) * width).view(len(requests), width).int()
    inputs = {
        "q": torch.randn(int(starts[-1]), heads.query, heads.size),
        "kv": torch.randn(blocks.numel(), heads.kv, BLOCK_SIZE, 2 * heads.size),
        "block_table": blocks,
        "seq_lens": torch.tensor([length for _, length in requests]).int(),
        "query_start_loc": starts,
    }
    return {name: t.cuda().bfloat16() if t.is_floating_point() else t.cuda() for name, t in inputs.items()}


def measure(kernels: Kernels, heads: Heads, requests: Sequence[tuple[int, int]]) -> str:
    """The cells of a row."""
    inputs = inputs_of(heads, requests)
    ours, theirs = (torch.full_like(inputs["q"], float("nan")) for _ in range(2))
    bound = kernels.bound(heads.symbol, [*inputs.values(), ours])

    def flash() -> None:
        vendor.paged_attention(**inputs, out=theirs, scale=heads.size**-0.5, soft_cap=heads.soft_cap)

    runs = [lambda call=call: [call() for _ in range(CALLS)] for call in (bound, flash)]
    times = [us / CALLS for us in median_us([kernels.graph(run) for run in runs])]
    if not heads.window:
        error = (ours.double() - theirs.double()).abs().max().item()
        assert error <= ROUNDING * theirs.abs().max().item(), f"{heads}: {error} from FlashAttention's"
    tflops = 4 * heads.query * heads.size * pairs(requests, heads.window) / times[0] / 1e6
    ratio = "" if heads.window else f"{times[1] / times[0]:.2f}x"
    return f"{times[0]:.0f} | {tflops:.0f} ({100 * tflops / PEAK_TFLOPS:.0f} %) | {times[1]:.0f} | {ratio}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["build", "measure"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.step == "build":
        return build(options.folder)
    torch.manual_seed(0)
    kernels = Kernels(options.folder / "kernels.so", configs={})
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| model | window | queries | ours µs | TFLOP/s | FlashAttention without the window µs | ours is |")
    print("|---|---|---|---|---|---|---|")
    for (model, heads), (step, requests) in product(MODELS.items(), STEPS.items()):
        print(f"| {model} | {heads.window or 'none'} | {step} | {measure(kernels, heads, requests)} |", flush=True)
    return None


if __name__ == "__main__":
    main()
