"""Relax, after all passes, to the functions of a plan, their kernels, and the weights they want.

Each call of one of our operators becomes a kernel step, reshapes become views, calls of
layer functions become call steps.  Buffers that are not alive together share memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import tvm
from tvm import relax

from .call_specs import op_spec, tensor_spec
from .errors import UnsupportedError
from .kernel_table import Kernels, KernelTable
from .ops import OwnOp, op_of
from .ops.base import arguments_of
from .relax_passes.add_greedy import GREEDY
from .relax_passes.base import Definitions
from .relax_passes.lift_weights import WEIGHTS
from .relax_passes.outline_layers import FORWARD, LOGITS, place
from .runtime.plan import Argument, CallStep, Function, KernelStep, Large, TorchStep, VendorCall
from .schedules.family import TorchCall, Vendor
from .schedules.layouts import Layout
from .schedules.select import Choice
from .slots import assign_slots
from .spec import OpSpec, TensorSpec
from .sums_in_place import add_in_place

VIEWS = {"relax.reshape", "relax.expand_dims", "relax.squeeze"}


@dataclass(frozen=True)
class StoredWeight:
    """A weight parameter of a function, in the layout its kernel wants (None: plain).

    `restored` is the layout from which a plain weight is restored when it is loaded; it is not stored itself.
    `read_by` is the call that the layout was chosen for.
    """

    parameter: str
    layout: Layout | None
    spec: TensorSpec
    read_by: OpSpec
    restored: Layout | None = None

    @property
    def name(self) -> str:
        return stored_name(self.parameter, self.layout)


def stored_name(parameter: str, layout: Layout | None) -> str:
    """What a weight is called in the artifact."""
    return parameter if layout is None else f"{parameter}.{layout.name}"


@dataclass
class Lowered:
    """Functions of the plan, kernels of each distinct call, and the weights of the entry points.

    `restored` gives, for each weight that is not stored, the name of the one it is restored from.
    """

    functions: dict[str, Function] = field(default_factory=dict)
    kernels: dict[OpSpec, Kernels] = field(default_factory=dict)
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    restored: dict[str, str] = field(default_factory=dict)


def lower(module: tvm.IRModule, choose: Callable[[OpSpec], Choice]) -> Lowered:
    """Lower the entry points and the layers they call; `choose` names the kernels for a call.

    Raises:
        UnsupportedError: an operator is left that no pass turned into one of ours, or for which there is no kernel;
            it is named, with its layers.
    """
    lowered, kernels = Lowered(), KernelTable(choose)
    functions = {var.name_hint: f for var, f in module.functions_items()}
    weight_names = _weight_parameters(functions)
    weights: dict[str, list[StoredWeight]] = {}
    for name in [*sorted(set(functions) - {FORWARD, LOGITS, WEIGHTS}), FORWARD, LOGITS]:
        lowering = _FunctionLowering(functions, weight_names, weights, kernels)
        try:
            lowered.functions[name] = lowering.run(name)
        except UnsupportedError as error:
            raise UnsupportedError(f"{place(module, name)}: {error}") from error
        weights[name] = list(lowering.weights.values())
    for weight in (weight for name in (FORWARD, LOGITS) for weight in weights[name]):
        if weight.restored is None:
            lowered.weights[weight.name] = weight
        else:
            lowered.restored[weight.name] = stored_name(weight.parameter, weight.restored)
    lowered.kernels = kernels.known
    # A weight that is stored plain for another call need not be restored.
    lowered.restored = {name: source for name, source in lowered.restored.items() if name not in lowered.weights}
    return lowered


def _weight_parameters(functions: dict[str, relax.Function]) -> dict[str, set[str]]:
    """Names of the parameters of each function that are weights."""
    stored = {str(name) for name in functions[WEIGHTS].attrs["stored"]}
    names = {FORWARD: stored, LOGITS: stored, GREEDY: set()}
    for binding in Definitions(functions[FORWARD]).bindings:
        call = binding.value
        if isinstance(call, relax.Call) and isinstance(call.op, tvm.ir.GlobalVar):
            callee = call.op.name_hint
            pairs = zip(functions[callee].params, call.args, strict=True)
            names[callee] = {p.name for p, a in pairs if isinstance(a, relax.Var) and a.name in stored}
    return names


class _FunctionLowering:
    """Walks one function, giving every variable a buffer."""

    def __init__(
        self,
        functions: dict[str, relax.Function],
        weight_names: dict[str, set[str]],
        callee_weights: dict[str, list[StoredWeight]],
        kernels: KernelTable,
    ) -> None:
        self._functions, self._weight_names = functions, weight_names
        self._callee_weights, self._kernels = callee_weights, kernels
        self.weights: dict[str, StoredWeight] = {}
        self._names: dict[relax.Var, str] = {}
        self._tuples: dict[relax.Var, list[str]] = {}
        self._scratch: dict[str, TensorSpec] = {}
        self._steps: list[KernelStep | TorchStep | CallStep] = []

    def run(self, name: str) -> Function:
        function = self._functions[name]
        self._names.update({p: p.name for p in function.params})
        self._own_weights = self._weight_names[name]
        for binding in Definitions(function).bindings:
            self._lower(binding)
        result = Argument(self._names[function.body.body], tensor_spec(function.body.body.ty))
        scratch = {name: spec for name, spec in self._scratch.items() if name != result.buffer}
        inputs = [p for p in function.params if p.name not in self._own_weights]
        steps = add_in_place(scratch, self._steps)
        return Function(
            name=name,
            inputs=tuple(Argument(p.name, tensor_spec(p.ty)) for p in inputs),
            weights=tuple(Argument(w.name, w.spec) for w in self.weights.values()),
            results=(result,),
            buffers=assign_slots(scratch, steps),
            steps=steps,
        )

    def _lower(self, binding: relax.VarBinding) -> None:
        value = binding.value
        if isinstance(value, relax.TupleGetItem):
            self._names[binding.var] = self._tuples[value.tuple_value][int(value.index)]
            return
        operator = value.op if isinstance(value, relax.Call) else None
        if isinstance(operator, tvm.ir.GlobalVar):
            self._call(binding.var, value)
        elif isinstance(operator, tvm.ir.Op) and operator.name in VIEWS:
            self._names[binding.var] = self._names[value.args[0]]
        elif (own := op_of(value)) is not None:
            self._kernel(binding.var, value, own)
        else:
            what = operator.name if isinstance(operator, tvm.ir.Op) else type(value).__name__
            raise UnsupportedError(f"operator {what} ({value.ty}) is left after all passes and has no kernel")

    def _call(self, var: relax.Var, call: relax.Call) -> None:
        callee = call.op.name_hint
        weights = self._callee_weights[callee]
        given = {p.name: a for p, a in zip(self._functions[callee].params, call.args, strict=True)}
        inputs = [self._names[a] for name, a in given.items() if name not in self._weight_names[callee]]
        stored = [self._weight(given[w.parameter], w.layout, w.read_by, w.restored) for w in weights]
        out = self._new_buffer(var.name, tensor_spec(var.ty))
        self._names[var] = out
        self._steps.append(CallStep(callee, (*inputs, *stored, out)))

    def _kernel(self, var: relax.Var, call: relax.Call, op: OwnOp) -> None:
        spec = op_spec(op, call)
        kernels = self._kernels.of(spec)
        arguments = []
        for (name, tensor), expr in zip(spec.inputs, call.args, strict=True):
            if isinstance(expr, relax.Var) and self._names[expr] in self._own_weights:
                weight = self._weight(expr, kernels.choice.layouts.get(name), spec)
                arguments.append(Argument(weight, self.weights[weight].spec))
            else:
                arguments.append(Argument(self._names[expr], tensor))
        outputs = [Argument(self._new_buffer(op.name, tensor), tensor) for tensor in spec.outputs]
        updated = [self._names[arguments_of(call)[name]] for name in op.updates]
        results = [*(out.buffer for out in outputs), *updated]
        if isinstance(var.ty, relax.TupleType):
            self._tuples[var] = results
        else:
            self._names[var] = results[0]
        if kernels.choice.calls:
            self._torch(kernels.choice.calls, [a.buffer for a in arguments], spec, outputs, kernels.symbols[0])
            return
        minimums = [variant.min_tokens for variant in kernels.choice.variants]
        variants = tuple(zip(minimums, kernels.symbols, strict=True))
        large = None
        if kernels.choice.vendor is not None:
            large = self._large(kernels.choice.vendor, spec, self._plain_arguments(spec, call, kernels), outputs)
        self._steps.append(KernelStep(op.name, kernels.choice.family.name, variants, (*arguments, *outputs), large))

    def _torch(
        self, calls: Sequence[TorchCall], inputs: list[str], spec: OpSpec, outputs: list[Argument], symbol: str
    ) -> None:
        """The parts of a call as steps; a part with a kernel is told its symbol."""
        named = zip(spec.inputs, inputs, strict=True)
        values = {name: Argument(buffer, tensor) for (name, tensor), buffer in named}
        values |= {f"out{number}": out for number, out in enumerate(outputs)}
        for call in calls:
            for name, tensor in call.results:
                if name not in values:
                    values[name] = Argument(self._new_buffer(name, tensor), tensor)
            attributes = (*call.attributes, ("kernel", symbol)) if call.kernel else call.attributes
            given = tuple((name, values[value]) for name, value in call.inputs)
            results = tuple(values[name] for name, _ in call.results)
            self._steps.append(TorchStep(call.function, given, results, attributes))

    def _plain_arguments(self, spec: OpSpec, call: relax.Call, kernels: Kernels) -> list[tuple[str, Argument]]:
        """Inputs by name, weights plain: where the kernel reads them packed, they are restored from that."""
        arguments = []
        for (name, tensor), expr in zip(spec.inputs, call.args, strict=True):
            if isinstance(expr, relax.Var) and self._names[expr] in self._own_weights:
                weight = self._weight(expr, None, spec, kernels.choice.layouts.get(name))
                arguments.append((name, Argument(weight, self.weights[weight].spec)))
            else:
                arguments.append((name, Argument(self._names[expr], tensor)))
        return arguments

    def _large(
        self, vendor: Vendor, spec: OpSpec, arguments: list[tuple[str, Argument]], outputs: list[Argument]
    ) -> Large:
        (result,) = outputs
        first, last, rest = [], [], spec
        if vendor.prologue is not None:
            call, rest = vendor.prologue.call, vendor.prologue.rest
            given = dict(arguments)
            made = [Argument(self._new_buffer(call.op, tensor), tensor) for tensor in call.outputs]
            first = [self._own_step(call, [*(given[name] for name, _ in call.inputs), *made])]
            left = iter(made)
            arguments = [(name, given[name] if name in given else next(left)) for name, _ in rest.inputs]
        if vendor.epilogue is not None:
            ((_, between),) = vendor.epilogue.inputs
            workspace = Argument(self._new_buffer("workspace", between), between)
            last = [self._own_step(vendor.epilogue, [workspace, result])]
            result = workspace
        main: KernelStep | VendorCall
        if isinstance(vendor.function, OpSpec):
            main = self._own_step(vendor.function, [*(argument for _, argument in arguments), result])
        else:
            main = VendorCall(vendor.function, (*arguments, ("out", result)), rest.attributes)
        return Large(vendor.min_tokens, vendor.prefill, (*first, main, *last))

    def _own_step(self, spec: OpSpec, arguments: list[Argument]) -> KernelStep:
        """A call of ours beside a vendor's, or instead of it."""
        kernels = self._kernels.of(spec)
        variants = tuple((v.min_tokens, s) for v, s in zip(kernels.choice.variants, kernels.symbols, strict=True))
        return KernelStep(spec.op, kernels.choice.family.name, variants, tuple(arguments))

    def _weight(self, expr: relax.Var, layout: Layout | None, read_by: OpSpec, restored: Layout | None = None) -> str:
        plain = tensor_spec(expr.ty)
        spec = plain if layout is None else TensorSpec(layout.shape(plain.shape), layout.dtype(plain.dtype))
        weight = StoredWeight(expr.name, layout, spec, read_by, restored)
        known = self.weights.get(weight.name)
        if known is None or known.restored is not None:
            self.weights[weight.name] = weight
        return weight.name

    def _new_buffer(self, name: str, spec: TensorSpec) -> str:
        unique = f"{name}.{len(self._scratch)}"
        self._scratch[unique] = spec
        return unique
