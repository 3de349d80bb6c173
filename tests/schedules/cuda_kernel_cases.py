"""CUDA kernels on a GPU machine without nvcc: `build` on one machine, `check` on another (cuda_cases.py).

Inputs are random (the seed is printed), expected results come from the operators' references; outputs are poisoned.
Every case runs eagerly and in a CUDA graph, which must give the same bits, and once with one input changed, which must
be noticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_compile import ops
from vllm_compile.schedules.cuda.build import build_library
from vllm_compile.schedules.family import KernelFamily, Variant
from vllm_compile.schedules.select import choose
from vllm_compile.spec import OpSpec
from vllm_compile.targets import cuda

from . import harness
from .expressions import every_function, inputs_of, rotation, spec_of

LIBRARY, SYMBOLS = "kernels.so", "kernels.json"  # of each case in order, the kernels that serve its call
LENGTHS = {  # (queries, cached tokens) of each request
    "decode_1": ((1, 128),),
    "decode_short": ((1, 1), (1, 16), (1, 17), (0, 0), (1, 300)),
    "decode_16": tuple((1, 1024 + 37 * i) for i in range(16)),
    "decode_40": tuple((1, 1 + 13 * i) for i in range(40)),
    "decode_long": ((1, 20000),),
    "decode_uneven": ((1, 200), (1, 9000), *((1, 30 + 5 * i) for i in range(36)), (1, 5000), (0, 0), (1, 1)),
    "mixed": ((1, 40), (9, 9), (5, 130), (0, 0), (1, 1)),
}
HEADS = {  # query heads, KV heads, head size
    "llama_8b": (32, 8, 128),
    "llama_1b": (32, 8, 64),
    "qwen_7b": (28, 4, 128),
    "mha": (4, 4, 64),
    "wide": (16, 1, 128),
    "large": (8, 4, 256),
    "large_11": (11, 1, 256),
    "phi_3": (32, 32, 96),
    "six_steps": (24, 4, 192),
}
SEEN = {  # heads, window and cap, which are smaller than the models' so that all of it shows
    "mistral_7b": ((32, 8, 128), {"window": 513}),
    "gemma_2": ((8, 4, 256), {"window": 100, "soft_cap": 1.5}),
    "cap_alone": ((16, 1, 128), {"soft_cap": 0.7}),
    "newest_alone": ((4, 4, 64), {"window": 1}),
}
EXPERTS = {  # experts, chosen by a token, K, width of an expert's MLP
    "mixtral": (8, 2, 1024, 1024),
    "qwen_3_moe": (128, 8, 512, 256),
}
PROMPTS = (*((1, 40 + i) for i in range(33)), (150, 150), (37, 900), (0, 0), (1, 1), (300, 1200))
SHARED = ((1, 32), (1, 33), (20, 52), (1, 300))  # request 0 fills a block in this step that the others share


@dataclass(frozen=True)
class Case:
    """One call; `changed` is the input that the negative control changes."""

    name: str
    op: ops.OwnOp
    inputs: dict[str, torch.Tensor]
    attributes: dict[str, Any]
    changed: str

    def spec(self) -> OpSpec:
        if self.op is ops.ELEMENTWISE:
            return spec_of(self.attributes["expression"])
        return harness.op_spec(self.op, self.inputs, self.attributes)


def cases(generator: torch.Generator) -> Iterator[Case]:
    """All cases; the same for the same seed."""
    bf16 = torch.bfloat16
    for width in (64, 2048, 4096, 4104, 8192):
        for tokens in (1, 7):
            yield Case("norm", ops.RMS_NORM, *ops.RMS_NORM.sample(generator, bf16, tokens, width), "x")
            yield Case("add", ops.ADD_RMS_NORM, *ops.ADD_RMS_NORM.sample(generator, bf16, tokens, width), "residual")
            yield Case("layer norm", ops.LAYER_NORM, *ops.LAYER_NORM.sample(generator, bf16, tokens, width), "x")
        inputs, attributes = ops.RMS_NORM.sample(generator, bf16, 6, width)
        inputs |= {"x": inputs["x"].view(2, 3, width), "weight": inputs["weight"].float()}
        yield Case("norm of heads, float weight", ops.RMS_NORM, inputs, attributes, "x")
    yield Case("write", ops.KV_CACHE_WRITE, *ops.KV_CACHE_WRITE.sample(generator, bf16, 9, 8, 128, 16, 128), "k")
    expressions = [rotation("bfloat16", interleaved, 8, 128) for interleaved in (False, True)]
    for nodes in [*expressions, every_function("bfloat16", 64), every_function("float32", 37)]:
        attributes = {"expression": tuple(nodes)}
        yield Case("expression", ops.ELEMENTWISE, inputs_of(nodes, generator, 5), attributes, "x0")
    yield Case("silu", ops.SILU_MUL, *ops.SILU_MUL.sample(generator, bf16, 5, 2056), "x")
    for dtype in (torch.int32, torch.int64):
        inputs, attributes = ops.EMBEDDING.sample(generator, bf16, 9, 40, 136)
        inputs["ids"] = inputs["ids"].to(dtype)
        yield Case("embedding", ops.EMBEDDING, inputs, attributes, "ids")
    for width in (24, 50257, 128256):
        for tokens in (1, 9, 300):
            yield Case(f"argmax {tokens}", ops.ARGMAX, *ops.ARGMAX.sample(generator, bf16, tokens, width), "logits")
    yield from experts(generator)
    for name, (heads, kv_heads, head_dim) in HEADS.items():
        for block_size in (16, 64, 128):
            for tokens in (1, 33):
                sample = ops.QKV_ROPE_CACHE.sample(generator, bf16, tokens, heads, kv_heads, head_dim, block_size)
                yield Case(f"{name} {block_size}", ops.QKV_ROPE_CACHE, *sample, "qkv")
        for batch, lengths in LENGTHS.items():
            for block_size in (16, 32) if batch != "decode_long" else (128,):
                sample = ops.PAGED_ATTENTION.sample(generator, bf16, lengths, heads, kv_heads, head_dim, block_size)
                yield Case(f"{name} {batch} {block_size}", ops.PAGED_ATTENTION, *sample, "kv")
                sample = ops.QKV_ROPE_ATTENTION.sample(generator, bf16, lengths, heads, kv_heads, head_dim, block_size)
                yield Case(f"{name} {batch} {block_size}", ops.QKV_ROPE_ATTENTION, *sample, "kv")
        yield from shared_blocks(name, generator, (heads, kv_heads, head_dim), {})
        yield prompts(name, generator, (heads, kv_heads, head_dim), {})
    for name, (heads, seen) in SEEN.items():
        for batch, lengths in LENGTHS.items():
            for op in (ops.PAGED_ATTENTION, ops.QKV_ROPE_ATTENTION):
                inputs, attributes = op.sample(generator, bf16, lengths, *heads, 16)
                yield Case(f"{name} {batch}", op, inputs, attributes | seen, "kv")
        yield from shared_blocks(name, generator, heads, seen)
        yield prompts(name, generator, heads, seen)


def prompts(name: str, generator: torch.Generator, heads: tuple[int, int, int], seen: dict[str, Any]) -> Case:
    """Attention by the kernel that takes queries of a request together."""
    inputs, attributes = ops.PAGED_ATTENTION.sample(generator, torch.bfloat16, PROMPTS, *heads, 32)
    return Case(f"{name} prompts", ops.PAGED_ATTENTION, inputs, attributes | seen | {"prompts": 1}, "kv")


def experts(generator: torch.Generator) -> Iterator[Case]:
    """Mixtures of experts: the router's linear layer, the router, gates and ups, what comes behind them."""
    bf16 = torch.bfloat16
    for name, (count, top_k, K, width) in EXPERTS.items():
        for tokens in (1, 5, 20, 150, 300):
            inputs, _ = ops.LINEAR.sample(generator, bf16, tokens, K, 8)
            yield Case(f"{name} {tokens}", ops.LINEAR, {key: inputs[key] for key in ("x", "weight")}, {}, "x")
            sample = ops.ROUTE.sample(generator, bf16, tokens, count, top_k)
            yield Case(f"{name} {tokens}", ops.ROUTE, *sample, "logits")
            sample = ops.EXPERT_GATE_UP_SILU.sample(generator, bf16, tokens, K, width, count, top_k)
            yield Case(f"{name} {tokens}", ops.EXPERT_GATE_UP_SILU, *sample, "x")
            sample = ops.EXPERT_LINEAR.sample(generator, bf16, tokens, width, K, count, top_k)
            yield Case(f"{name} {tokens}", ops.EXPERT_LINEAR, *sample, "x")


def shared_blocks(
    name: str, generator: torch.Generator, heads: tuple[int, int, int], seen: dict[str, Any]
) -> Iterator[Case]:
    """Attention where others read what request 0 fills."""
    for op in (ops.PAGED_ATTENTION, ops.QKV_ROPE_ATTENTION):
        inputs, attributes = op.sample(generator, torch.bfloat16, SHARED, *heads, 16)
        yield Case(f"{name} shared", op, sharing(0, 0, 2)(inputs), attributes | seen, "kv")


def sharing(first: int, filler: int, blocks: int) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Requests from `first` on have the first blocks of request `filler`, which is among them."""

    def change(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        table = inputs["block_table"].clone()
        table[first:, :blocks] = table[filler, :blocks]
        return inputs | {"block_table": table}

    return change


def build(folder: Path, seed: int) -> None:
    """Every variant for each distinct call."""
    target, kernels = cuda.for_chip(), {}
    specs = [case.spec() for case in cases(torch.Generator().manual_seed(seed))]
    found = variants_of(specs)
    for spec, variants in found.items():
        for symbol, variant in variants.items():
            kernels[symbol] = family_of(spec).build(spec, variant.config, target)
    folder.mkdir(parents=True, exist_ok=True)
    resources = build_library(kernels, target, folder / LIBRARY)
    (folder / SYMBOLS).write_text(json.dumps([list(found[spec]) for spec in specs]))
    spilled = {symbol: used for symbol, used in resources.items() if used.spilled_bytes}
    print(f"{len(kernels)} kernels; spills: {spilled or 'none'}")


def family_of(spec: OpSpec) -> KernelFamily:
    return choose(spec, cuda.for_chip(), lossless=False).family


def variants_of(specs: Sequence[OpSpec]) -> dict[OpSpec, dict[str, Variant]]:
    """Of each distinct call, by symbol; numbered in the order of the calls."""
    found = {spec: family_of(spec).variants(spec, cuda.for_chip()) for spec in dict.fromkeys(specs)}
    return {s: {f"kernel_{i}_{v.min_tokens}": v for v in variants} for i, (s, variants) in enumerate(found.items())}


def check(folder: Path, seed: int) -> int:
    """Run every case; returns the number that failed."""
    import tvm_ffi

    module = tvm_ffi.load_module(str(folder / LIBRARY))
    symbols, failed = json.loads((folder / SYMBOLS).read_text()), 0
    for case, names in zip(cases(torch.Generator().manual_seed(seed)), symbols, strict=True):
        for name, problems in zip(names, check_case(case, [module[name] for name in names]), strict=True):
            if problems:
                failed += 1
                print(f"{case.op.name} {case.name} {name}: {'; '.join(problems)}", flush=True)
    print(f"{sum(map(len, symbols))} kernels run on {len(symbols)} cases, {failed} failed (seed {seed})")
    return failed


def check_case(case: Case, kernels: Sequence[Any]) -> list[list[str]]:
    """What is wrong with each kernel on one case."""
    copies = {name: tensor.clone() for name, tensor in case.inputs.items()}
    written = harness.written(case.op, copies, case.attributes)
    # The leading unit axes of the model's batch are not in memory.
    written = [w.flatten(0, w.dim() - len(o.shape)) for w, o in zip(written, case.spec().outputs, strict=True)]
    rows = owned_rows(case.inputs, written[0].shape[0] if written else 1)
    expected = [*(result[rows] for result in written), *(copies[name] for name in case.op.updates)]
    tolerance = case.op.tolerance["bfloat16"]

    def run(kernel: Any, inputs: dict[str, torch.Tensor], graph: bool) -> list[torch.Tensor]:
        given = {name: tensor.cuda() for name, tensor in inputs.items()}
        outputs = [torch.full_like(result, poison_of(result), device="cuda") for result in written]
        call(kernel, [*given.values(), *outputs], graph)
        return [*(out.cpu()[rows] for out in outputs), *(given[name].cpu() for name in case.op.updates)]

    def wrong(actual: list[torch.Tensor]) -> list[str]:
        pairs = zip(actual, expected, strict=True)
        return [m for ours, theirs in pairs if (m := mismatch(ours, theirs, tolerance.rtol, tolerance.atol))]

    changed = case.inputs[case.changed].clone()
    if case.changed == "logits":
        changed[:1] *= -1  # adding to all changes nothing
    elif case.changed == "ids":
        changed[0] = (changed[0] + 4) % len(case.inputs["table"])
    else:
        changed[slice(None) if case.changed == "kv" else slice(1)] += 4
    other = {**case.inputs, case.changed: changed}

    def problems(kernel: Any) -> list[str]:
        eager, replayed = (run(kernel, case.inputs, graph) for graph in (False, True))
        found = wrong(eager)
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(eager, replayed, strict=True)):
            found.append("a replayed graph gives other bits")
        if not wrong(run(kernel, other, graph=False)):
            found.append("a changed input is not noticed")
        return found

    return [problems(kernel) for kernel in kernels]


def poison_of(result: torch.Tensor) -> float:
    return harness.POISON[str(result.dtype).removeprefix("torch.")]


def call(kernel: Any, tensors: list[torch.Tensor], graph: bool) -> None:
    """Run a kernel on torch's stream, or capture it and replay it three times."""
    import tvm_ffi

    arguments = [tvm_ffi.from_dlpack(tensor) for tensor in tensors]
    captured = torch.cuda.CUDAGraph()
    context = torch.cuda.graph(captured) if graph else None
    with tvm_ffi.use_torch_stream(context) if context is not None else tvm_ffi.use_torch_stream():
        kernel(*arguments)
    for _ in range(3 if graph else 0):
        captured.replay()
    torch.cuda.synchronize()


def owned_rows(inputs: dict[str, torch.Tensor], rows: int) -> torch.Tensor:
    """Rows of the result that belong to a request with cached tokens; the others are left undefined."""
    if "query_start_loc" not in inputs:
        return torch.arange(rows)
    starts, lengths = inputs["query_start_loc"].tolist(), inputs["seq_lens"].tolist()
    return torch.cat([torch.arange(starts[r], starts[r + 1]) for r, length in enumerate(lengths) if length])


def mismatch(ours: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float) -> str:
    """What is wrong, or nothing."""
    same = torch.isclose(ours.float(), expected.float(), rtol=rtol, atol=atol, equal_nan=True)
    if bool(same.all()):
        return ""
    error = (ours.float() - expected.float()).abs()[~same]
    return f"{int((~same).sum())} of {same.numel()} differ, by up to {error.max().item():.3g}"
