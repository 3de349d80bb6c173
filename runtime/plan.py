"""The compiled program as data: what `plan.json` holds.

A plan is a straight-line program.  Its functions work on named buffers whose sizes are
proportional to the number of tokens T; each step either runs a kernel or calls another
function of the plan (a decoder layer, once per layer).  Nothing here is code: an executor
binds a plan to memory, and any engine can read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_compile.spec import Dim, Sym, TensorSpec

SCHEMA = 1


@dataclass(frozen=True)
class Argument:
    """A buffer as one step sees it: the same bytes under a shape of the step's own."""

    buffer: str
    spec: TensorSpec


@dataclass(frozen=True)
class VendorCall:
    """Calls a function of `vendor.py` with tensors and plain values by name."""

    function: str
    arguments: tuple[tuple[str, Argument], ...]
    attributes: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class KernelStep:
    """Runs one kernel: the variant with the largest min_tokens that is not above T.

    `large` is what runs instead in large batches: a library of the serving environment, or kernels faster then.
    """

    op: str
    family: str
    variants: tuple[tuple[int, str], ...]  # (min_tokens, symbol), ascending
    arguments: tuple[Argument, ...]
    large: Large | None = None


@dataclass(frozen=True)
class Large:
    """Steps for batches of at least `min_tokens` tokens; if `prefill`, only of those where a request has several."""

    min_tokens: int
    prefill: bool
    steps: tuple[VendorCall | KernelStep, ...]


@dataclass(frozen=True)
class TorchStep:
    """Calls a function of `torch_functions.py` with tensors and plain values by name; it returns its results.

    Programs of such steps are for chips whose graphs torch makes.
    """

    function: str
    inputs: tuple[tuple[str, Argument], ...]
    results: tuple[Argument, ...]
    attributes: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class CallStep:
    """Calls a function of the plan; `arguments` are its inputs, weights and results, in order."""

    function: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Buffer:
    """Scratch memory [T, ...]; buffers in the same slot are never alive at the same time."""

    name: str
    spec: TensorSpec
    slot: int

    @property
    def bytes_per_token(self) -> int:
        return self.spec.nbytes(tokens=1)


@dataclass(frozen=True)
class Function:
    """One function: what it is given, its scratch buffers, its steps.

    `results` are buffers that the caller provides and this function fills.
    """

    name: str
    inputs: tuple[Argument, ...]
    weights: tuple[Argument, ...]
    results: tuple[Argument, ...]
    buffers: tuple[Buffer, ...]
    steps: tuple[KernelStep | TorchStep | CallStep, ...]

    def slot_bytes_per_token(self) -> list[int]:
        """Size of each slot: that of its largest buffer."""
        sizes = [0] * (1 + max((b.slot for b in self.buffers), default=-1))
        for buffer in self.buffers:
            sizes[buffer.slot] = max(sizes[buffer.slot], buffer.bytes_per_token)
        return sizes


@dataclass(frozen=True)
class ModelShape:
    """What a serving engine must know of the model.

    A cached token takes `cache_width` columns of each KV head: `head_dim` of the key, then `value_dim` of the value (as
    many as of the key where None; 0 where values are a part of the key).
    Sequences have up to `max_positions` tokens; where they may have more, up to `long_positions`, position p of every
    sequence is given as max_positions + p.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    dtype: str
    value_dim: int | None = None
    long_positions: int = 0

    @property
    def cache_width(self) -> int:
        return self.head_dim + (self.head_dim if self.value_dim is None else self.value_dim)


@dataclass(frozen=True)
class Plan:
    """`forward` and `logits` are the entry points; the other functions are layers they call.

    `greedy`, if there is one, is an entry point too: logits [T, V] -> the most probable tokens, int64 [T, 1].
    `restored` names the weights that are not stored: plain copies, for vendor calls, of the lossless ones it gives.
    """

    model: ModelShape
    functions: dict[str, Function]
    restored: dict[str, str] = field(default_factory=dict)
    schema: int = field(default=SCHEMA)

    @property
    def runs_in_torch(self) -> bool:
        """True if its steps are functions of torch: there are no kernels to load."""
        return any(isinstance(step, TorchStep) for function in self.functions.values() for step in function.steps)

    def to_json(self) -> str:
        """Deterministic: the same plan gives the same bytes."""
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def kernel_steps(functions: Mapping[str, Function]) -> Iterator[tuple[Function, KernelStep]]:
    """The kernels that one step of a model runs, entry point by entry point, each with the function it stands in."""

    def inside(function: Function) -> Iterator[tuple[Function, KernelStep]]:
        for step in function.steps:
            if isinstance(step, KernelStep):
                yield function, step
            elif isinstance(step, CallStep):
                yield from inside(functions[step.function])

    for entry in ("forward", "logits", "greedy"):
        if entry in functions:
            yield from inside(functions[entry])


def from_json(text: str) -> Plan:
    """The plan that `to_json` wrote.

    Raises:
        ValueError, KeyError, TypeError: the text is no plan of this schema.
    """
    raw = json.loads(text)
    if raw["schema"] != SCHEMA:
        raise ValueError(f"schema {raw['schema']}, this version reads {SCHEMA}")
    functions = {name: _function(value) for name, value in raw["functions"].items()}
    return Plan(ModelShape(**raw["model"]), functions, raw["restored"], raw["schema"])


def _function(raw: dict[str, Any]) -> Function:
    inputs, weights, results = (tuple(_argument(a) for a in raw[key]) for key in ("inputs", "weights", "results"))
    buffers = tuple(Buffer(b["name"], _spec(b["spec"]), b["slot"]) for b in raw["buffers"])
    return Function(raw["name"], inputs, weights, results, buffers, tuple(_step(s) for s in raw["steps"]))


def _step(raw: dict[str, Any]) -> KernelStep | TorchStep | CallStep:
    if "results" in raw:
        return _torch_step(raw)
    if "function" in raw:
        return CallStep(raw["function"], tuple(raw["arguments"]))
    return _kernel_step(raw)


def _torch_step(raw: dict[str, Any]) -> TorchStep:
    inputs = tuple((name, _argument(a)) for name, a in raw["inputs"])
    results = tuple(_argument(a) for a in raw["results"])
    return TorchStep(raw["function"], inputs, results, tuple((name, value) for name, value in raw["attributes"]))


def _kernel_step(raw: dict[str, Any]) -> KernelStep:
    variants = tuple((minimum, symbol) for minimum, symbol in raw["variants"])
    arguments = tuple(_argument(a) for a in raw["arguments"])
    return KernelStep(raw["op"], raw["family"], variants, arguments, raw["large"] and _large(raw["large"]))


def _large(raw: dict[str, Any]) -> Large:
    steps = tuple(_vendor_call(s) if "function" in s else _kernel_step(s) for s in raw["steps"])
    return Large(raw["min_tokens"], raw["prefill"], steps)


def _vendor_call(raw: dict[str, Any]) -> VendorCall:
    arguments = tuple((name, _argument(a)) for name, a in raw["arguments"])
    return VendorCall(raw["function"], arguments, tuple((name, value) for name, value in raw["attributes"]))


def _argument(raw: dict[str, Any]) -> Argument:
    return Argument(raw["buffer"], _spec(raw["spec"]))


def _spec(raw: dict[str, Any]) -> TensorSpec:
    return TensorSpec(tuple(_dim(d) for d in raw["shape"]), raw["dtype"], raw["strided"])


def _dim(raw: int | str) -> Dim:
    return raw if isinstance(raw, int) else Sym(raw)
