"""Builds the candidates of a task, and what their results are compared with: a process of its own, with TVM.

Reads a task's payload from stdin; writes kernels, tensors and `case.json` into the directory that is its argument.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_compile.errors import TargetError
from vllm_compile.ops import OPS
from vllm_compile.runtime.manifest import LIBRARY
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets import resolve

from ..build import build_library
from ..database.fingerprint import Fingerprint
from ..database.machine import fingerprint
from ..select import FAMILIES
from .measure import CASE, TENSORS


def prepare(payload: dict[str, Any], folder: Path) -> None:
    """Write the case of a task: its inputs are random (the seed is in it), its results the operator's reference's."""
    target = resolve(payload["target"])
    family = next(family for family in FAMILIES[target.name] if family.name == payload["family"])
    machine = fingerprint(target, payload.get("board", ""))
    if "machine" in payload and not Fingerprint.from_text(payload["machine"]).describes(machine):
        raise TargetError(f"the task is for another machine: {payload['machine']}; this one is {machine.text}")
    content = json.loads(payload["ranges"][0][0])
    spec = call_of(content)
    layouts = family.layouts(spec, target)
    if content["layouts"] != (here := {name: layout.name for name, layout in layouts.items()}):
        raise TargetError(
            f"the task is for weights laid out as {content['layouts']}; kernels of this machine want {here}"
        )
    configs: list[Any] = []
    ranges = []
    for workload, tokens, wanted in payload["ranges"]:
        configs += [config for config in wanted if config not in configs]
        symbols = [f"k{configs.index(config)}" for config in wanted]
        ranges.append({"workload": workload, "tokens": tokens, "symbols": symbols})
    kernels = {f"k{i}": family.build(spec, config, target) for i, config in enumerate(configs)}
    build_library(kernels, target, folder / LIBRARY)

    seed = secrets.randbits(32)
    generator = torch.Generator().manual_seed(seed)
    most = max(entry["tokens"] for entry in ranges)
    inputs = {name: sample(tensor, most, generator) for name, tensor in spec.inputs}
    op = OPS[spec.op]
    expected = op.reference(**inputs, **dict(spec.attributes))
    tensors = {f"{i}": layouts[n].pack(t) if n in layouts else t for i, (n, t) in enumerate(inputs.items())}
    save_file({**tensors, "expected": expected}, folder / TENSORS)
    tolerance = op.tolerance[str(expected.dtype).removeprefix("torch.")]
    case = {
        "seed": seed,
        "device": target.name,
        "family": family.name,
        "configs": {f"k{i}": config for i, config in enumerate(configs)},
        "ranges": ranges,
        "by_tokens": [Sym.TOKENS in tensor.shape for _, tensor in spec.inputs],
        "weights": [name in layouts or _is_matrix(tensor) for name, tensor in spec.inputs],
        "row_bytes": sum(t.nbytes(1) for t in (*dict(spec.inputs).values(), *spec.outputs) if Sym.TOKENS in t.shape),
        "tolerance": [tolerance.rtol, tolerance.atol],
        "machine": machine.text,
    }
    (folder / CASE).write_text(json.dumps(case))


def _is_matrix(tensor: TensorSpec) -> bool:
    """True for weights of several axes: what a kernel streams."""
    return Sym.TOKENS not in tensor.shape and len(tensor.shape) > 1


def call_of(workload: dict[str, Any]) -> OpSpec:
    """The call that a workload's content is of."""

    def tensor(shape: list[Any], dtype: str, strided: bool) -> TensorSpec:
        return TensorSpec(tuple(Sym(d) if isinstance(d, str) else d for d in shape), dtype, strided)

    attributes = tuple(sorted(workload["attributes"].items()))
    inputs = tuple((name, tensor(*rest)) for name, *rest in workload["inputs"])
    options = frozenset(OPS[workload["op"]].options).intersection(workload["attributes"])
    return OpSpec(workload["op"], inputs, tuple(tensor(*out) for out in workload["outputs"]), attributes, options)


def sample(spec: TensorSpec, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Gaussian numbers; matrices of weights scaled so that sums of products stay of order one."""
    value = torch.randn(spec.sizes(tokens), generator=generator)
    if _is_matrix(spec):
        value *= value.shape[-1] ** -0.5
    return value.to(getattr(torch, spec.dtype))


if __name__ == "__main__":
    prepare(json.loads(sys.stdin.read()), Path(sys.argv[1]))
