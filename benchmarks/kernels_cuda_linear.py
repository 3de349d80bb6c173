"""Linear layers of Llama models at decode sizes on a GPU: ours, plain and lossless, against cuBLAS (torch's F.linear).

    python benchmarks/kernels_cuda_linear.py build DIR           # needs TVM and nvcc, no GPU
    python benchmarks/kernels_cuda_linear.py measure DIR         # needs a GPU, torch and apache-tvm-ffi, no TVM

`measure` checks first (every kernel against float64, on random and on adversarial weights, on poisoned outputs; CUDA
graph replay and eager bit for bit; a token's row in every batch), then prints a markdown table.  Each product is
captured into a CUDA graph that goes through copies of the weight of 400 MB or more in all, eight times the L2 cache;
the medians of 15 replays of ours and of cuBLAS's, taking turns, are divided by the number of copies.
TB/s counts the bytes of the weight as it is stored; the share is that of the GPU's --bandwidth.  Where a compiled model
leaves so many tokens to cuBLAS, the table says so.  --models takes some of the models only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vllm_compile import lossless
from vllm_compile.spec import OpSpec, Sym, TensorSpec

DEVICE = "cuda"
LAYERS = ("qkv", "o", "gate_up", "down", "lm_head")
MODELS = {  # [N, K] of each layer
    "Llama-3.2-1B": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048)),
    "Llama-3.1-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    "Mistral-7B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (32000, 4096)),
    "Qwen2.5-7B": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944), (152064, 3584)),
}
BIASED = {("Qwen2.5-7B", "qkv")}
TOKENS = (1, 8, 16, 32, 64)
BUCKETS = {1: 8, 9: 16, 17: 32, 33: 64}  # least and most tokens of a variant, as in schedules/cuda/matmul.py
COLD_BYTES = 400_000_000
REPLAYS = 15
KINDS = {"plain": False, "lossless": True}


def spec_of(op: str, N: int, K: int, residual: bool, bias: bool = False) -> OpSpec:
    """The call of a linear layer, or of a gated half of an MLP with N // 2 results."""
    width = N // 2 if op == "gate_up_silu" else N
    inputs = [("x", TensorSpec((Sym.TOKENS, K), "bfloat16")), ("weight", TensorSpec((N, K), "bfloat16"))]
    if bias:
        inputs.append(("bias", TensorSpec((N,), "bfloat16")))
    if residual:
        inputs.append(("residual", TensorSpec((Sym.TOKENS, N), "bfloat16")))
    return OpSpec(op, tuple(inputs), (TensorSpec((Sym.TOKENS, width), "bfloat16"),))


def calls(models: Sequence[str]) -> list[tuple[str, str, OpSpec]]:
    """(model, layer, call): the bare products, and the fused forms that a compiled model calls; each once."""
    found: dict[OpSpec, tuple[str, str]] = {}
    for model in models:
        layers = dict(zip(LAYERS, MODELS[model], strict=True))
        for layer, (N, K) in layers.items():
            spec = spec_of("linear", N, K, residual=False, bias=(model, layer) in BIASED)
            found.setdefault(spec, (model, layer))
        for layer in ("o", "down"):
            found.setdefault(spec_of("linear", *layers[layer], residual=True), (model, f"{layer} + residual"))
        spec = spec_of("gate_up_silu", *layers["gate_up"], residual=False)
        found.setdefault(spec, (model, "gate_up, silu * up"))
    return [(model, layer, spec) for spec, (model, layer) in found.items()]


def symbol(spec: OpSpec, kind: str, number: int | str) -> str:
    N, K = spec.input("weight").shape
    optional = "".join(f"_{name}" for name in ("bias", "residual") if spec.has_input(name))
    return f"{spec.op}{optional}_{N}_{K}_{kind}_{number}"


def family_of(spec: OpSpec, packed: bool) -> Any:
    from vllm_compile.schedules.cuda.gate_up import GateUpSilu
    from vllm_compile.schedules.cuda.linear import Linear

    return {"linear": Linear, "gate_up_silu": GateUpSilu}[spec.op](packed)


def build(folder: Path, models: Sequence[str]) -> None:
    """One library with every variant of every call, and the configurations by symbol."""
    from vllm_compile.targets import cuda

    configs = {}
    for _, _, spec in calls(models):
        for kind, packed in KINDS.items():
            for variant in family_of(spec, packed).variants(spec, cuda.for_chip()):
                configs[symbol(spec, kind, variant.min_tokens)] = (spec, variant.config)
    build_configs(folder / "kernels.so", configs)


def build_configs(path: Path, configs: Mapping[str, tuple[OpSpec, Mapping[str, Any]]]) -> None:
    """One library, and its configurations beside it."""
    from vllm_compile.schedules.cuda.build import build_library
    from vllm_compile.targets import cuda

    target = cuda.for_chip()
    kernels = {
        name: family_of(spec, config["lossless"]).build(spec, config, target)
        for name, (spec, config) in configs.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    resources = build_library(kernels, target, path)
    path.with_suffix(".json").write_text(json.dumps({name: config for name, (_, config) in configs.items()}))
    slow = [name for name, used in resources.items() if used.spilled_bytes or used.serialized]
    print(f"{path.name}: {len(kernels)} kernels, {len(slow)} with spills or serialized products {slow}", flush=True)


class Kernels:
    """The library, by call and number of tokens.

    Args:
        configs: by symbol; None: those that lie beside the library.
    """

    def __init__(self, path: Path, configs: Mapping[str, Any] | None = None) -> None:
        import tvm_ffi

        self.ffi = tvm_ffi
        self.module = tvm_ffi.load_module(str(path))
        self.configs = json.loads(path.with_suffix(".json").read_text()) if configs is None else configs

    def caller(self, spec: OpSpec, kind: str, tokens: int, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """The call, bound to its tensors; it runs on the stream of the surrounding `use_torch_stream`."""
        return self.bound(symbol(spec, kind, self.variant(spec, kind, tokens)), tensors)

    def variant(self, spec: OpSpec, kind: str, tokens: int) -> int:
        """The variant for so many tokens."""
        return max(m for m in BUCKETS if m <= tokens and symbol(spec, kind, m) in self.configs)

    def serves(self, spec: OpSpec, kind: str, tokens: int) -> bool:
        """Whether a compiled model calls a kernel of these for so many tokens, and not cuBLAS."""
        return tokens <= BUCKETS[self.variant(spec, kind, tokens)]

    def bound(self, name: str, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        kernel = self.module[name]
        arguments = [self.ffi.from_dlpack(tensor) for tensor in tensors]
        return lambda: kernel(*arguments)

    def graph(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """`run`, once as it is and once captured."""
        with self.ffi.use_torch_stream():
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with self.ffi.use_torch_stream(torch.cuda.graph(graph)):
            run()
        return graph


def adversarial(N: int, K: int) -> torch.Tensor:
    """Weights with zeros of both signs, denormals, outliers up and down, and a row of zeros."""
    weight = (torch.randn(N, K, device=DEVICE) * 0.02).bfloat16()
    weight[1] = 0
    weight[2, ::3] = 0
    weight[3, ::5] = -0.0
    weight[4, :60] = 1e-39  # denormal
    weight[5, 7] = 3e4
    weight[::7, 11] = -(2.0**-60)
    weight[N - 1, K - 1] = 1e20
    return weight


def extras(spec: OpSpec, tokens: int) -> dict[str, torch.Tensor]:
    """Random bias and residual, as far as the call has them."""
    N = spec.input("weight").size(0)
    shapes = {"bias": (N,), "residual": (tokens, N)}
    return {
        name: torch.randn(shape, device=DEVICE).bfloat16() for name, shape in shapes.items() if spec.has_input(name)
    }


def reference(spec: OpSpec, x: torch.Tensor, weight: torch.Tensor, more: Mapping[str, torch.Tensor]):
    """(result, error allowed) in float64: one rounding to bf16 a step, and float32 sums of K products."""
    y, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    if "bias" in more:
        y, size = y + more["bias"].double(), size + more["bias"].double().abs()
    residual = more.get("residual")
    slack = 2.0**-18 * size
    if spec.op == "gate_up_silu":
        gate, up = y.chunk(2, dim=-1)
        gate_error, up_error = (2.0**-8 * y.abs() + slack).chunk(2, dim=-1)
        silu = F.silu(gate)
        error = (1.1 * gate_error + 2.0**-8 * silu.abs()) * up.abs() + silu.abs() * up_error + 2 * gate_error * up_error
        return silu * up, error + 2.0**-8 * (silu * up).abs()
    if residual is None:
        return y, 2.0**-8 * y.abs() + slack
    return y + residual.double(), 2.0**-8 * (y.abs() + (y + residual.double()).abs()) * 1.01 + slack


def check(kernels: Kernels, spec: OpSpec) -> int:
    """Checks every variant for the tokens that it serves; returns the number of results checked."""
    N, K = spec.input("weight").shape
    checked = 0
    for make in (lambda: (torch.randn(N, K, device=DEVICE) * 0.02).bfloat16(), lambda: adversarial(N, K)):
        weight = make()
        packed = lossless.pack(weight)
        assert torch.equal(lossless.unpack(packed, N, K).view(torch.int16), weight.view(torch.int16)), "not restored"
        x = torch.randn(64, K, device=DEVICE).bfloat16()
        more = extras(spec, 64)
        wanted, allowed = reference(spec, x, weight, more)
        for kind in KINDS:
            rows: dict[int, list[torch.Tensor]] = {}
            for tokens in filter(partial(kernels.serves, spec, kind), (1, 2, 5, 8, 9, 16, 21, 32, 33, 64)):
                y = torch.full((tokens, spec.outputs[0].size(1)), float("nan"), device=DEVICE, dtype=torch.bfloat16)
                inputs = [x[:tokens], packed if kind == "lossless" else weight]
                inputs += [value[:tokens] if name == "residual" else value for name, value in more.items()]
                graph = kernels.graph(kernels.caller(spec, kind, tokens, [*inputs, y]))
                eager = y.clone()
                y.fill_(float("nan"))
                graph.replay()
                torch.cuda.synchronize()
                where = f"{symbol(spec, kind, tokens)}"
                assert torch.equal(eager, y), f"{where}: replay differs from eager"
                error = (y.double() - wanted[:tokens]).abs() / allowed[:tokens].clamp(min=1e-300)
                assert bool((error <= 1).all()), f"{where}: {error.max().item():.2f} times the error allowed"
                rows.setdefault(kernels.variant(spec, kind, tokens), []).append(y)
                checked += y.numel()
            for variant, results in rows.items():
                differing = [len(y) for y in results if not torch.equal(y, results[-1][: len(y)])]
                assert not differing, f"{symbol(spec, kind, variant)}: rows depend on the batch: {differing}"
    return checked


def median_us(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
    """Median microseconds of each graph, taking turns."""
    times: list[list[float]] = [[] for _ in graphs]
    for turn in range(REPLAYS + 1):
        for graph, taken in zip(graphs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                taken.append(begin.elapsed_time(end) * 1e3)
    return [sorted(taken)[len(taken) // 2] for taken in times]


def cold_weights(spec: OpSpec) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Copies of a weight, plain and packed, that the L2 cache cannot hold."""
    N, K = spec.input("weight").shape
    plain = [(torch.randn(N, K, device=DEVICE) * 0.02).bfloat16()]
    packed = [lossless.pack(plain[0])]
    copies = -(-COLD_BYTES // packed[0].numel())
    for weights in (plain, packed):
        weights += [weights[0].clone() for _ in range(copies - 1)]
    return plain, packed


def cublas_of(
    spec: OpSpec, x: torch.Tensor, weights: Sequence[torch.Tensor], more: Mapping[str, torch.Tensor]
) -> Callable[[], None]:
    """The call by torch, once with each weight."""

    def run() -> None:
        for weight in weights:
            product = F.linear(x, weight, more.get("bias"))
            if "residual" in more:
                product = more["residual"] + product
            if spec.op == "gate_up_silu":
                gate, up = product.chunk(2, dim=-1)
                product = F.silu(gate) * up

    return run


def measure(kernels: Kernels, spec: OpSpec, bandwidth: float) -> list[tuple[int, str]]:
    """(tokens, cells of a table row) of one call."""
    N, K = spec.input("weight").shape
    plain, packed = cold_weights(spec)
    copies = len(plain)
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, K, device=DEVICE).bfloat16()
        more = extras(spec, tokens)
        y = torch.empty(tokens, spec.outputs[0].size(1), device=DEVICE, dtype=torch.bfloat16)
        graphs = {"cuBLAS": kernels.graph(cublas_of(spec, x, plain, more))}
        for kind, weights in zip(KINDS, (plain, packed), strict=True):
            if kernels.serves(spec, kind, tokens):
                bound = [kernels.caller(spec, kind, tokens, [x, weight, *more.values(), y]) for weight in weights]
                graphs[kind] = kernels.graph(lambda bound=bound: [call() for call in bound])
        times = {name: time / copies for name, time in zip(graphs, median_us(list(graphs.values())), strict=True)}
        cells = [f"{times['cuBLAS']:.1f}"]
        for kind, nbytes in zip(KINDS, (N * K * 2, packed[0].numel()), strict=True):
            if kind in times:
                rate = nbytes / times[kind] / 1e6
                ratio = f"{times['cuBLAS'] / times[kind]:.2f}"
                cells += [f"{times[kind]:.1f}", ratio, f"{rate:.2f} ({100 * rate / bandwidth:.0f} %)"]
            else:
                cells += ["cuBLAS", "", ""]
        rows.append((tokens, " | ".join(cells)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["build", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bandwidth", type=float, default=4.8, help="of the GPU's memory in TB/s (default: an H200's)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    if options.step == "build":
        return build(options.folder, options.models)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    kernels = Kernels(options.folder / "kernels.so")
    checked = sum(check(kernels, spec) for _, _, spec in calls(options.models))
    print(f"{name}, torch {torch.__version__}, apache-tvm-ffi {kernels.ffi.__version__}: {checked} results checked\n")
    print("| model | layer | weight | tokens | cuBLAS µs | plain µs | ratio | TB/s | lossless µs | ratio | TB/s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for model, layer, spec in calls(options.models):
        for tokens, cells in measure(kernels, spec, options.bandwidth):
            N, K = spec.input("weight").shape
            print(f"| {model} | {layer} | {N} x {K} | {tokens} | {cells} |", flush=True)
    return None


if __name__ == "__main__":
    main()
