"""Linear layers of Llama models at decode sizes on a GPU: ours, plain and lossless, against cuBLAS (torch's F.linear).

    python benchmarks/kernels_cuda_linear.py build DIR      # needs TVM and nvcc, no GPU
    python benchmarks/kernels_cuda_linear.py measure DIR    # needs a GPU, torch and apache-tvm-ffi, no TVM

`measure` checks first (every kernel against float64, on random and on adversarial weights, on poisoned outputs; CUDA
graph replay and eager bit for bit; a token's row in every batch), then prints a markdown table.  Each product is
captured into a CUDA graph that goes through copies of the weight of 400 MB or more in all, eight times the L2 cache;
the medians of 15 replays of ours and of cuBLAS's, taking turns, are divided by the number of copies.
TB/s counts the bytes of the weight as it is stored; the share is that of the GPU's --bandwidth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from vllm_compile.schedules import lossless
from vllm_compile.spec import OpSpec, Sym, TensorSpec

LAYERS = ("qkv", "o", "gate_up", "down", "lm_head")
MODELS = {  # [N, K] of each layer
    "Llama-3.2-1B": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048)),
    "Llama-3.1-8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
}
TOKENS = (1, 8, 16, 32, 64)
COLD_BYTES = 400_000_000
REPLAYS = 15
KINDS = {"plain": False, "lossless": True}


def spec_of(op: str, N: int, K: int, residual: bool) -> OpSpec:
    """The call of a linear layer, or of a gated half of an MLP with N // 2 results."""
    width = N // 2 if op == "gate_up_silu" else N
    inputs = [("x", TensorSpec((Sym.TOKENS, K), "bfloat16")), ("weight", TensorSpec((N, K), "bfloat16"))]
    if residual:
        inputs.append(("residual", TensorSpec((Sym.TOKENS, N), "bfloat16")))
    return OpSpec(op, tuple(inputs), (TensorSpec((Sym.TOKENS, width), "bfloat16"),))


def calls() -> list[tuple[str, str, OpSpec]]:
    """(model, layer, call): the bare products, and the fused forms that a compiled model calls."""
    found = []
    for model, shapes in MODELS.items():
        layers = dict(zip(LAYERS, shapes, strict=True))
        for layer, (N, K) in layers.items():
            found.append((model, layer, spec_of("linear", N, K, residual=False)))
        for layer in ("o", "down"):
            found.append((model, f"{layer} + residual", spec_of("linear", *layers[layer], residual=True)))
        found.append((model, "gate_up, silu * up", spec_of("gate_up_silu", *layers["gate_up"], residual=False)))
    return found


def symbol(spec: OpSpec, kind: str, min_tokens: int) -> str:
    N, K = spec.input("weight").shape
    return f"{spec.op}{'_residual' * spec.has_input('residual')}_{N}_{K}_{kind}_{min_tokens}"


def build(folder: Path) -> None:
    """One library with every variant of every call, and the list of their symbols."""
    from vllm_compile.schedules.cuda.build import build_library
    from vllm_compile.schedules.cuda.gate_up import GateUpSilu
    from vllm_compile.schedules.cuda.linear import Linear
    from vllm_compile.targets import cuda

    target = cuda.detect()
    kernels = {}
    for _, _, spec in calls():
        for kind, packed in KINDS.items():
            family = {"linear": Linear, "gate_up_silu": GateUpSilu}[spec.op](packed)
            for variant in family.variants(spec, target):
                kernels[symbol(spec, kind, variant.min_tokens)] = family.build(spec, variant.config, target)
    folder.mkdir(parents=True, exist_ok=True)
    resources = build_library(kernels, target, folder / "kernels.so")
    (folder / "symbols.txt").write_text("\n".join(sorted(kernels)) + "\n")
    spilled = [name for name, used in resources.items() if used.spilled_bytes]
    print(f"{len(kernels)} kernels, {len(spilled)} with spills {spilled}")


class Kernels:
    """The library, by call and number of tokens."""

    def __init__(self, folder: Path) -> None:
        import tvm_ffi

        self.ffi = tvm_ffi
        self.module = tvm_ffi.load_module(str(folder / "kernels.so"))
        self.symbols = set((folder / "symbols.txt").read_text().split())

    def caller(self, spec: OpSpec, kind: str, tokens: int, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
        """The call, bound to its tensors; it runs on the stream of the surrounding `use_torch_stream`."""
        fitting = [m for m in (1, 9, 17, 33) if m <= tokens and symbol(spec, kind, m) in self.symbols]
        kernel = self.module[symbol(spec, kind, fitting[-1])]
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
    weight = (torch.randn(N, K, device="cuda") * 0.02).bfloat16()
    weight[1] = 0
    weight[2, ::3] = 0
    weight[3, ::5] = -0.0
    weight[4, :60] = 1e-39  # denormal
    weight[5, 7] = 3e4
    weight[::7, 11] = -(2.0**-60)
    weight[N - 1, K - 1] = 1e20
    return weight


def reference(spec: OpSpec, x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None):
    """(result, error allowed) in float64: one rounding to bf16 a step, and float32 sums of K products."""
    y, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
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
    """Checks every variant; returns the number of results checked."""
    N, K = spec.input("weight").shape
    checked = 0
    for make in (lambda: (torch.randn(N, K, device="cuda") * 0.02).bfloat16(), lambda: adversarial(N, K)):
        weight = make()
        packed = lossless.pack(weight)
        assert torch.equal(lossless.unpack(packed, N, K).view(torch.int16), weight.view(torch.int16)), "not restored"
        x = torch.randn(64, K, device="cuda").bfloat16()
        residual = torch.randn(64, N, device="cuda").bfloat16() if spec.has_input("residual") else None
        wanted, allowed = reference(spec, x, weight, residual)
        for kind in KINDS:
            rows = {}
            for tokens in (1, 2, 5, 8, 9, 16, 21, 32, 33, 64):
                y = torch.full((tokens, spec.outputs[0].size(1)), float("nan"), device="cuda", dtype=torch.bfloat16)
                inputs = [x[:tokens], packed if kind == "lossless" else weight]
                inputs += [residual[:tokens]] if residual is not None else []
                graph = kernels.graph(kernels.caller(spec, kind, tokens, [*inputs, y]))
                eager = y.clone()
                y.fill_(float("nan"))
                graph.replay()
                torch.cuda.synchronize()
                where = f"{symbol(spec, kind, tokens)}"
                assert torch.equal(eager, y), f"{where}: replay differs from eager"
                error = (y.double() - wanted[:tokens]).abs() / allowed[:tokens].clamp(min=1e-300)
                assert bool((error <= 1).all()), f"{where}: {error.max().item():.2f} times the error allowed"
                rows[tokens] = y
                checked += y.numel()
            differing = [tokens for tokens, y in rows.items() if not torch.equal(y, rows[64][:tokens])]
            assert not differing, f"{symbol(spec, kind, 64)}: rows depend on the batch: {differing}"
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


def measure(kernels: Kernels, spec: OpSpec, bandwidth: float) -> list[tuple[int, str]]:
    """(tokens, cells of a table row) of one call."""
    N, K = spec.input("weight").shape
    plain = [(torch.randn(N, K, device="cuda") * 0.02).bfloat16()]
    packed = [lossless.pack(plain[0])]
    copies = -(-COLD_BYTES // packed[0].numel())
    for weights in (plain, packed):
        weights += [weights[0].clone() for _ in range(copies - 1)]
    rows = []
    for tokens in TOKENS:
        x = torch.randn(tokens, K, device="cuda").bfloat16()
        residual = [torch.randn(tokens, N, device="cuda").bfloat16()] if spec.has_input("residual") else []
        y = torch.empty(tokens, spec.outputs[0].size(1), device="cuda", dtype=torch.bfloat16)

        def cublas(x=x, residual=residual):
            for weight in plain:
                product = F.linear(x, weight)
                if residual:
                    product = residual[0] + product
                if spec.op == "gate_up_silu":
                    gate, up = product.chunk(2, dim=-1)
                    product = F.silu(gate) * up

        graphs = [kernels.graph(cublas)]
        for kind, weights in zip(KINDS, (plain, packed), strict=True):
            bound = [kernels.caller(spec, kind, tokens, [x, weight, *residual, y]) for weight in weights]
            graphs.append(kernels.graph(lambda bound=bound: [call() for call in bound]))
        theirs, ours, ours_packed = (time / copies for time in median_us(graphs))
        rates = [N * K * 2 / ours / 1e6, packed[0].numel() / ours_packed / 1e6]
        share = [100 * rate / bandwidth for rate in rates]
        rows.append(
            (
                tokens,
                f"{theirs:.1f} | {ours:.1f} | {theirs / ours:.2f} | {rates[0]:.2f} ({share[0]:.0f} %) | "
                f"{ours_packed:.1f} | **{theirs / ours_packed:.2f}** | {rates[1]:.2f} ({share[1]:.0f} %)",
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["build", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bandwidth", type=float, default=4.8, help="of the GPU's memory in TB/s (default: an H200's)")
    options = parser.parse_args()
    if options.step == "build":
        return build(options.folder)
    kernels = Kernels(options.folder)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    checked = sum(check(kernels, spec) for _, _, spec in calls())
    print(f"{name}, torch {torch.__version__}, apache-tvm-ffi {kernels.ffi.__version__}: {checked} results checked\n")
    print("| model | layer | weight | tokens | cuBLAS µs | plain µs | ratio | TB/s | lossless µs | ratio | TB/s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for model, layer, spec in calls():
        for tokens, cells in measure(kernels, spec, options.bandwidth):
            N, K = spec.input("weight").shape
            print(f"| {model} | {layer} | {N} x {K} | {tokens} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
