"""Builds one kernel, loads it without TVM's runtime, runs it on poisoned outputs, compares with the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tvm_ffi

from vllm_compile.ops import OwnOp
from vllm_compile.schedules.build import build_library
from vllm_compile.schedules.family import KernelFamily
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets import Target

T, R, R1, W, B, N = Sym.TOKENS, Sym.REQUESTS, Sym.BOUNDARIES, Sym.TABLE_WIDTH, Sym.BLOCKS, Sym.BLOCK_SIZE
POISON = {"float32": float("nan"), "bfloat16": float("nan"), "int32": -(2**31), "int64": -(2**63)}
# Axes that are bound at each call, by input name; all others are known when a kernel is built.
SYMBOLIC: dict[str, dict[int, Sym]] = {
    **{name: {0: T} for name in ("x", "residual", "q", "k", "v", "qkv", "cos", "sin", "ids", "slot_mapping")},
    **{name: {0: T} for name in ("logits", "experts", "order", "ends")},
    "kv": {0: B, 2: N},
    "block_table": {0: R, 1: W},
    "seq_lens": {0: R},
    "query_start_loc": {0: R1},
}


def tensor_spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    symbolic = SYMBOLIC.get(name, {})
    shape = tuple(symbolic.get(axis, size) for axis, size in enumerate(tensor.shape))
    return TensorSpec(shape, str(tensor.dtype).removeprefix("torch."), strided=name == "kv")


def results(op: OwnOp, inputs: dict[str, torch.Tensor], attributes: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The reference's results; inputs that the operator updates are changed in place."""
    result = op.reference(**inputs, **attributes)
    return result if isinstance(result, tuple) else (result,)


def written(op: OwnOp, inputs: dict[str, torch.Tensor], attributes: dict[str, Any]) -> list[torch.Tensor]:
    """Those of the reference's results that are no input it has updated in place."""
    return [r for r in results(op, inputs, attributes) if not any(r is inputs[name] for name in op.updates)]


def op_spec(op: OwnOp, inputs: dict[str, torch.Tensor], attributes: dict[str, Any]) -> OpSpec:
    copies = {name: tensor.clone() for name, tensor in inputs.items()}
    outputs = tuple(tensor_spec("x", tensor) for tensor in written(op, copies, attributes))
    named = tuple((name, tensor_spec(name, tensor)) for name, tensor in inputs.items())
    options = frozenset(name for name in op.options if name in attributes)
    return OpSpec(op.name, named, outputs, tuple(sorted(attributes.items())), options)


def compile_variants(
    family: KernelFamily, spec: OpSpec, target: Target, folder: Path
) -> dict[int, Callable[..., None]]:
    """min_tokens -> callable, for every variant of `family`."""
    assert family.serves(spec, target)
    variants = family.variants(spec, target)
    path = folder / f"{family.name}.so".replace("/", "_")
    build_library({f"k{v.min_tokens}": family.build(spec, v.config, target) for v in variants}, target, path)
    module = tvm_ffi.load_module(str(path))
    return {variant.min_tokens: module[f"k{variant.min_tokens}"] for variant in variants}


def run(
    kernel: Callable[..., None],
    family: KernelFamily,
    spec: OpSpec,
    target: Target,
    inputs: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Packs the weights, poisons the outputs with NaN, runs the kernel, returns the outputs."""
    layouts = family.layouts(spec, target)
    arguments = [layouts[name].pack(tensor) if name in layouts else tensor for name, tensor in inputs.items()]
    tokens = next(iter(inputs.values())).shape[0]
    outputs = poisoned(spec, tokens)
    kernel(*arguments, *outputs)
    return outputs


def poisoned(spec: OpSpec, tokens: int) -> tuple[torch.Tensor, ...]:
    """Outputs that hold what no kernel writes."""
    return tuple(
        torch.full(out.sizes(tokens), POISON[out.dtype], dtype=getattr(torch, out.dtype)) for out in spec.outputs
    )


def assert_matches(op: OwnOp, actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    """Every result within the operator's own tolerance."""
    assert len(actual) == len(expected)
    for ours, reference in zip(actual, expected, strict=True):
        tolerance = op.tolerance[str(reference.dtype).removeprefix("torch.")]
        torch.testing.assert_close(ours, reference, rtol=tolerance.rtol, atol=tolerance.atol)
