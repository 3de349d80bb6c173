"""What is tuned: one call of an operator for a range of tokens, or a TVM module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from vllm_compile.canonical import canonical, object_of, sha256
from vllm_compile.spec import OpSpec, TensorSpec


@dataclass(frozen=True)
class Workload:
    """The canonical JSON of what is tuned, and the identity that it is found by.

    Attributes:
        text: canonical JSON, all of it.
        identity: canonical JSON of what equal workloads have in common: `text` itself for calls of operators; for TVM
            modules their structural hash, since equal modules may have different texts.
    """

    text: str
    identity: str

    @staticmethod
    def of_call(spec: OpSpec, layouts: Mapping[str, str], tokens: tuple[int, int | None]) -> Workload:
        """A call, the names of its weights' layouts, and the least and most tokens served (None: no limit)."""
        text = canonical(
            {
                "op": spec.op,
                "inputs": [[name, *_tensor(tensor)] for name, tensor in spec.inputs],
                "outputs": [_tensor(tensor) for tensor in spec.outputs],
                "attributes": dict(spec.attributes),
                "layouts": dict(layouts),
                "tokens": tokens,
            }
        )
        return Workload(text, text)

    @staticmethod
    def of_module(structural_hash: str, saved: str) -> Workload:
        """A TVM module: its structural hash, and the module as `tvm.ir.save_json` gives it."""
        return Workload.from_text(canonical({"module": saved, "structural_hash": structural_hash}))

    @staticmethod
    def from_text(text: str) -> Workload:
        """The workload that `text` is the canonical JSON of; ValueError if it is of none."""
        content = object_of(text)
        if "module" in content:
            return Workload(text, canonical({"structural_hash": content.get("structural_hash")}))
        if not {"op", "inputs", "outputs", "attributes", "layouts", "tokens"} <= content.keys():
            raise ValueError("neither a call of an operator nor a module")
        return Workload(text, text)

    @cached_property
    def key(self) -> str:
        """SHA-256 of the identity, in hex: what the database finds it by, before it compares the whole."""
        return sha256(self.identity)

    def summary(self) -> str:
        """One line for people: `linear x=Tx4096 weight=4096x14336 tokens 1-8`."""
        content = json.loads(self.text)
        if "module" in content:
            return f"module {content['structural_hash']}"
        inputs = " ".join(f"{name}={'x'.join(map(str, shape))}" for name, shape, *_ in content["inputs"])
        least, most = content["tokens"]
        layouts = "".join(f" {name}:{layout}" for name, layout in sorted(content["layouts"].items()))
        return f"{content['op']} {inputs}{layouts} tokens {least}-{most or ''}"


def _tensor(tensor: TensorSpec) -> list[object]:
    return [list(tensor.shape), tensor.dtype, tensor.strided]
