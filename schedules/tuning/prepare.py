"""Builds the candidates of a task: a process of its own, with TVM.

Reads a task's payload from stdin; writes kernels and `case.json`, which says how they are called and compared, into the
directory that is its argument.
"""

from __future__ import annotations

import json
import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_compile.errors import TargetError
from vllm_compile.ops import OPS
from vllm_compile.runtime.manifest import LIBRARY
from vllm_compile.spec import OpSpec, Sym
from vllm_compile.targets import resolve

from ..build import build_library
from ..database.fingerprint import Fingerprint
from ..database.machine import fingerprint
from ..select import FAMILIES
from .inputs import described, is_matrix, spec_of
from .measure import CASE


def prepare(payload: dict[str, Any], folder: Path) -> None:
    """Write the case of a task; its inputs, of which it has the seed, are made where it is measured (inputs.py)."""
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

    tolerance = OPS[spec.op].tolerance[spec.outputs[0].dtype]
    case = {
        "seed": secrets.randbits(32),
        "tokens": max(entry["tokens"] for entry in ranges),
        "device": target.name,
        "family": family.name,
        "configs": {f"k{i}": config for i, config in enumerate(configs)},
        "ranges": ranges,
        "by_tokens": [Sym.TOKENS in tensor.shape for _, tensor in spec.inputs],
        "layouts": described(layouts),
        "weights": [name in layouts or is_matrix(tensor) for name, tensor in spec.inputs],
        "row_bytes": sum(t.nbytes(1) for t in (*dict(spec.inputs).values(), *spec.outputs) if Sym.TOKENS in t.shape),
        "tolerance": [tolerance.rtol, tolerance.atol],
        "machine": machine.text,
    }
    (folder / CASE).write_text(json.dumps(case))


def call_of(workload: dict[str, Any]) -> OpSpec:
    """The call that a workload's content is of."""
    options = frozenset(OPS[workload["op"]].options).intersection(workload["attributes"])
    return replace(spec_of(workload), options=options)


if __name__ == "__main__":
    prepare(json.loads(sys.stdin.read()), Path(sys.argv[1]))
