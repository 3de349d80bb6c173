"""What computes each operator on a Gaudi: torch's matrix products and gathers, and fused kernels for the TPCs.

Products go to the MMEs through torch, 2 * T * K * N FLOPs at up to 432 (Gaudi 2) and 1,835 TFLOP/s (Gaudi 3).  A fused
kernel reads and writes each byte once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_compile.expression import read_expression
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets import Target

from ..family import Config, KernelFamily, TorchCall
from . import expressions, tpc
from .expressions import Fused
from .kernel import Kernel

Calls = Callable[[OpSpec], Sequence[TorchCall]]


@dataclass(frozen=True, kw_only=True)
class Torch(KernelFamily):
    """An operator by functions of torch; `fused` gives the expression of the part that is a kernel of ours."""

    op: str = ""
    calls: Calls
    options: frozenset[str] = frozenset()
    fused: Callable[[OpSpec], Fused] | None = None

    @property
    def name(self) -> str:
        return f"gaudi.{self.op}"

    def serves(self, spec: OpSpec, target: Target) -> bool:
        return True

    def torch_calls(self, spec: OpSpec) -> Sequence[TorchCall]:
        return self.calls(spec)

    def build(self, spec: OpSpec, config: Config, target: Target) -> Kernel | None:
        """The kernel for the TPCs, None where torch does all of the call."""
        return tpc.generate(self.fused(spec)) if self.fused is not None else None


def _whole(function: str, *attributes: str) -> Calls:
    """The function of that name, given all inputs of the call and these of its attributes and options."""

    def calls(spec: OpSpec) -> Sequence[TorchCall]:
        given = tuple((name, value) for name, value in spec.attributes if name in attributes)
        return (TorchCall(function, _all(spec), _outputs(spec), given),)

    return calls


def _all(spec: OpSpec) -> tuple[tuple[str, str], ...]:
    return tuple((name, name) for name, _ in spec.inputs)


def _outputs(spec: OpSpec) -> tuple[tuple[str, TensorSpec], ...]:
    return tuple((f"out{number}", tensor) for number, tensor in enumerate(spec.outputs))


def _fused_call(fused: Fused, inputs: Any, results: Any) -> TorchCall:
    attributes = (("expression", fused.nodes), ("results", fused.results))
    return TorchCall("fused", inputs, results, attributes, kernel=tpc.generate(fused) is not None)


def _fused(op: str, fused: Callable[[OpSpec], Fused]) -> Torch:
    """An operator that is one fused kernel."""
    return Torch(op=op, calls=lambda spec: (_fused_call(fused(spec), _all(spec), _outputs(spec)),), fused=fused)


def _elementwise(spec: OpSpec) -> Fused:
    nodes = read_expression(spec.attribute("expression"))
    return Fused(nodes, (len(nodes) - 1,))


def _gate(spec: OpSpec) -> Fused:
    (out,) = spec.outputs
    return expressions.silu_mul(out.size(-1), out.dtype)


def _gate_up_silu(spec: OpSpec) -> Sequence[TorchCall]:
    both = TensorSpec((Sym.TOKENS, spec.input("weight").size(0)), spec.outputs[0].dtype)
    product = TorchCall("linear", _all(spec), (("both", both),))
    return product, _fused_call(_gate(spec), (("x", "both"),), _outputs(spec))


def _rotation(spec: OpSpec) -> Fused:
    heads, kv_heads = spec.attribute("num_heads"), spec.attribute("num_kv_heads")
    return expressions.rotate(
        heads + kv_heads, heads + 2 * kv_heads, spec.attribute("head_dim"), spec.input("qkv").dtype
    )


def _qkv_rope_cache(spec: OpSpec) -> Sequence[TorchCall]:
    heads = spec.attribute("num_heads") + spec.attribute("num_kv_heads")
    rotated = TensorSpec((Sym.TOKENS, heads, spec.attribute("head_dim")), spec.input("qkv").dtype)
    turn = _fused_call(_rotation(spec), tuple((n, n) for n in ("qkv", "cos", "sin")), (("rotated", rotated),))
    names = ("rotated", "qkv", "kv", "slot_mapping")
    return turn, TorchCall("split_and_cache", tuple((n, n) for n in names), _outputs(spec))


FAMILIES: tuple[KernelFamily, ...] = (
    Torch(op="embedding", calls=_whole("embedding")),
    Torch(op="linear", calls=_whole("linear")),
    Torch(op="gate_up_silu", calls=_gate_up_silu, fused=_gate),
    _fused("silu_mul", _gate),
    _fused("rms_norm", expressions.rms_norm),
    _fused("add_rms_norm", expressions.rms_norm),
    _fused("layer_norm", expressions.layer_norm),
    _fused("elementwise", _elementwise),
    Torch(op="qkv_rope_cache", calls=_qkv_rope_cache, fused=_rotation),
    Torch(op="kv_cache_write", calls=_whole("kv_cache_write")),
    Torch(
        op="paged_attention",
        calls=_whole("paged_attention", "scale", "window", "soft_cap"),
        options=frozenset({"window", "soft_cap"}),
    ),
)
