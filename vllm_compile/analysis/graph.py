"""A module's operators as plain data: what a step runs, how often, on what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir.expr import GenericConst

from vllm_compile.call_specs import op_spec
from vllm_compile.errors import UnsupportedError
from vllm_compile.lowering import VIEWS
from vllm_compile.ops import LAYER_BOUNDARY, op_of
from vllm_compile.ops.base import arguments_of
from vllm_compile.relax_passes.base import Definitions
from vllm_compile.relax_passes.lift_weights import WEIGHTS
from vllm_compile.relax_passes.outline_layers import FORWARD, LOGITS
from vllm_compile.spec import Dim, OpSpec, Sym, TensorSpec

MAIN = "main"  # the whole model, before its layers are outlined
# Parameters of the entry points that are no weights, with one `kv_i` per layer.
INPUTS = {"input_ids", "positions", "block_table", "seq_lens", "query_start_loc", "slot_mapping", "hidden"}


@dataclass(frozen=True)
class Call:
    """One operator, as often as a step runs it.

    Attributes:
        function: where it stands: `forward`, `logits`, a layer (or `main`).
        spec: operator and shapes; operators of Relax are called `relax.…`, their inputs `0`, `1`, ….
        weights: inputs that are weights, or computed from weights alone, with a name for people.
        reads: for each input, the numbers of the calls of the same function that made it.
        times: calls in one step.
        once: it depends on weights alone: it need not run in a step at all.
    """

    function: str
    spec: OpSpec
    weights: Mapping[str, str]
    reads: Mapping[str, tuple[int, ...]]
    times: int
    once: bool

    @property
    def op(self) -> str:
        return self.spec.op

    @property
    def label(self) -> str:
        """The operator and its weight, for people: `linear q_proj + k_proj + v_proj`."""
        return " ".join([self.op, *list(self.weights.values())[:1]])


def numbered_calls(all_calls: Sequence[Call]) -> list[tuple[int, Call]]:
    """Each call with its number in its function."""
    seen: dict[str, int] = {}
    numbered = []
    for call in all_calls:
        numbered.append((seen.setdefault(call.function, 0), call))
        seen[call.function] += 1
    return numbered


@dataclass(frozen=True)
class _Value:
    """Which call made a value, and the weight that it is, if it is one."""

    made_by: frozenset[int] = frozenset()
    weight: str | None = None


def calls(module: tvm.IRModule) -> list[Call]:
    """The operators that a step of the model runs, in order; each function's at its first call.

    Raises:
        UnsupportedError: an expression is none that can be counted.
    """
    functions = {var.name_hint: function for var, function in module.functions_items()}
    stored = _stored_names(functions[WEIGHTS]) if WEIGHTS in functions else {}
    found: list[Call] = []
    for entry in [MAIN] if MAIN in functions else [FORWARD, LOGITS]:
        function = functions[entry]
        names = {p: None if _is_input(p.name) else stored.get(p.name, short_name(p.name)) for p in function.params}
        found += _Walk(functions, entry, names, 1).run()
    return found


def short_name(parameter: str) -> str:
    """`model_layers_3_self_attn_q_proj_weight` -> `q_proj`."""
    name = re.sub(r"^(.*_)?(layers|h|decoder_layers)_\d+_", "", parameter).removeprefix("model_")
    return re.sub(r"^(self_attn|attn|attention|mlp)_", "", name).removesuffix("_weight")


def _is_input(name: str) -> bool:
    return name in INPUTS or re.fullmatch(r"kv_\d+", name) is not None


def _stored_names(function: relax.Function) -> dict[str, str]:
    """What each stored weight is made of, by the name it has in `forward` and `logits`."""
    definitions = Definitions(function)
    result = definitions.value(function.body.body)
    return {str(n): _sources(definitions, v) for n, v in zip(function.attrs["stored"], result.fields, strict=True)}


def _sources(definitions: Definitions, expr: Any) -> str:
    value = definitions.value(expr)
    if isinstance(value, relax.Var):
        return short_name(value.name)
    return " + ".join(dict.fromkeys(_sources(definitions, var) for var in _operands(value)))


def _operands(value: Any) -> list[Any]:
    """Variables and constants that a call or tuple is given, tuples among them opened."""
    given = value.fields if isinstance(value, relax.Tuple) else getattr(value, "args", [])
    return [inner for arg in given for inner in (arg.fields if isinstance(arg, relax.Tuple) else [arg])]


class _Walk:
    """Goes through one function, keeping what each variable is."""

    def __init__(
        self, functions: Mapping[str, relax.Function], name: str, parameters: Mapping[Any, str | None], times: int
    ) -> None:
        self._functions, self._name, self._times = functions, name, times
        self._values: dict[Any, _Value] = {p: _Value(weight=weight) for p, weight in parameters.items()}
        self._own: list[Call] = []

    def run(self) -> list[Call]:
        bindings = Definitions(self._functions[self._name]).bindings
        callees = Counter(b.value.op.name_hint for b in bindings if _is_call_of_ours(b.value))
        found: list[Call] = []
        for binding in bindings:
            value = binding.value
            if _is_call_of_ours(value):
                callee = value.op.name_hint
                if times := callees.pop(callee, 0):
                    found += self._callee(callee, value, times)
                self._values[binding.var] = _Value()
            else:
                found += self._binding(binding)
        return found

    def _callee(self, name: str, call: relax.Call, times: int) -> list[Call]:
        pairs = zip(self._functions[name].params, call.args, strict=True)
        names = {p: self._values[a].weight if isinstance(a, relax.Var) else None for p, a in pairs}
        return _Walk(self._functions, name, names, self._times * times).run()

    def _binding(self, binding: relax.VarBinding) -> Iterator[Call]:
        value = binding.value
        if isinstance(value, relax.TupleGetItem):
            self._values[binding.var] = self._values[value.tuple_value]
        elif isinstance(value, relax.Var):
            self._values[binding.var] = self._values[value]
        elif isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
            operands = [arg for arg in _operands(value) if isinstance(arg, relax.Var)]
            if value.op.name in VIEWS or LAYER_BOUNDARY.matches(value):
                self._values[binding.var] = self._values[operands[0]]
                return
            call = self._call(value, operands)
            weight = " + ".join(dict.fromkeys(call.weights.values())) if call.once else None
            self._values[binding.var] = _Value(frozenset({len(self._own)}), weight)
            self._own.append(call)
            yield call
        elif isinstance(value, relax.Tuple):
            parts = [self._values[field] for field in value.fields]
            self._values[binding.var] = _Value(frozenset().union(*(part.made_by for part in parts)))
        elif not isinstance(value, GenericConst | relax.ShapeExpr):
            raise UnsupportedError(f"{type(value).__name__} in {self._name} cannot be counted")

    def _call(self, call: relax.Call, operands: Sequence[relax.Var]) -> Call:
        op = op_of(call)
        spec = op_spec(op, call) if op is not None else _relax_spec(call)
        given = arguments_of(call) if op is not None else dict(zip(map(str, range(99)), operands, strict=False))
        known = {name: self._values[arg] for name, arg in given.items()}
        weights = {name: value.weight for name, value in known.items() if value.weight is not None}
        reads = {name: tuple(sorted(value.made_by)) for name, value in known.items()}
        once = bool(known) and len(weights) == len(known)
        return Call(self._name, spec, weights, reads, self._times, once)


def _is_call_of_ours(value: Any) -> bool:
    return isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar)


def _relax_spec(call: relax.Call) -> OpSpec:
    """A plain Relax operator as data: its tensors, whole shapes."""
    operands = [arg for arg in _operands(call) if isinstance(arg, relax.Var)]
    types = call.ty.fields if isinstance(call.ty, relax.TupleType) else [call.ty]
    inputs = tuple((str(i), _whole_spec(arg.ty, call)) for i, arg in enumerate(operands))
    return OpSpec(call.op.name, inputs, tuple(_whole_spec(type_, call) for type_ in types))


def _whole_spec(type_: Any, call: relax.Call) -> TensorSpec:
    if not isinstance(type_, relax.TensorType):
        raise UnsupportedError(f"operator {call.op.name} of {type_} cannot be counted")
    shape: list[Dim] = []
    for dim in type_.shape.values:
        if isinstance(dim, tirx.IntImm | int):
            shape.append(int(dim))
        elif isinstance(dim, tirx.Var) and dim.name in set(Sym):
            shape.append(Sym(dim.name))
        else:
            raise UnsupportedError(f"operator {call.op.name} has an axis of {dim}, which cannot be counted")
    return TensorSpec(tuple(shape), str(type_.dtype), strided=Sym.BLOCKS in shape)
