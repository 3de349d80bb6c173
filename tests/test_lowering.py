"""Relax to a plan: which buffers share memory, what is left over, what is written down."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_compile.errors import UnsupportedError
from vllm_compile.lowering import Lowered, lower
from vllm_compile.relax_passes.pipeline import passes_for, run_passes
from vllm_compile.runtime.plan import Argument, CallStep, KernelStep, ModelShape, Plan, from_json
from vllm_compile.schedules.family import Variant
from vllm_compile.schedules.layouts import Panels
from vllm_compile.schedules.select import Choice
from vllm_compile.slots import assign_slots
from vllm_compile.spec import DTYPE_BYTES, OpSpec, Sym, TensorSpec

SHAPE = ModelShape(2, 4, 2, 12, 48, 80, 64, "float32")


@dataclass(frozen=True)
class Program:
    """Each step reads some buffers and makes new ones; `inputs` are no scratch."""

    inputs: tuple[str, ...]
    steps: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]  # (read, written)
    scratch: dict[str, TensorSpec]
    calls: tuple[bool, ...]

    def plan_steps(self) -> list[KernelStep | CallStep]:
        steps: list[KernelStep | CallStep] = []
        for (read, written), is_call in zip(self.steps, self.calls, strict=True):
            names = (*read, *written)
            spec = TensorSpec((Sym.TOKENS,), "float32")
            arguments = tuple(Argument(name, self.scratch.get(name, spec)) for name in names)
            step = CallStep("layer", names) if is_call else KernelStep("op", "family", ((1, "k"),), arguments)
            steps.append(step)
        return steps


@st.composite
def programs(draw) -> Program:
    inputs = tuple(f"in{i}" for i in range(draw(st.integers(0, 2))))
    made: list[str] = []
    steps = []
    for index in range(draw(st.integers(1, 12))):
        known = [*inputs, *made]
        read = draw(st.lists(st.sampled_from(known), max_size=4)) if known else []
        written = tuple(f"b{index}.{i}" for i in range(draw(st.integers(1, 3))))
        steps.append((tuple(read), written))
        made += written
    shapes = st.tuples(st.just(Sym.TOKENS), st.integers(1, 64))
    specs = st.builds(TensorSpec, shapes, st.sampled_from(sorted(DTYPE_BYTES)))
    calls = tuple(draw(st.booleans()) for _ in steps)
    return Program(inputs, tuple(steps), {name: draw(specs) for name in made}, calls)


def run(program: Program, slot_of: dict[str, int]) -> None:
    """Executes a program on slots; what is read must be what was written under that name."""
    memory: dict[int, str] = {}
    for read, written in program.steps:
        for name in read:
            assert name in program.inputs or memory[slot_of[name]] == name
        held = {slot_of[name] for name in read if name not in program.inputs}
        places = [slot_of[name] for name in written]
        assert len(set(places)) == len(places), "two results in one place"
        assert held.isdisjoint(places), "a kernel writes over what it still reads"
        memory.update(zip(places, written, strict=True))


def most_alive(program: Program) -> int:
    """The largest number of buffers that a step needs at once."""
    last = {name: i for i, (read, written) in enumerate(program.steps) for name in (*read, *written)}
    first = {name: i for i, (_, written) in enumerate(program.steps) for name in written}
    return max(sum(first[n] <= i <= last[n] for n in first) for i in range(len(program.steps)))


@given(programs())
def test_slots_never_overlap(program):
    buffers = assign_slots(program.scratch, program.plan_steps())
    assert sorted(b.name for b in buffers) == sorted(program.scratch)
    assert all(b.spec == program.scratch[b.name] for b in buffers)
    slot_of = {b.name: b.slot for b in buffers}
    run(program, slot_of)
    assert max(slot_of.values()) + 1 == most_alive(program), "no more slots than needed"


def test_an_overlap_is_noticed():
    """Negative control: the checker above on slots that are wrong."""
    scratch = {name: TensorSpec((Sym.TOKENS, 4), "float32") for name in ("a", "b", "c")}
    program = Program((), (((), ("a",)), (("a",), ("b",)), (("a", "b"), ("c",))), scratch, (False,) * 3)
    run(program, {"a": 0, "b": 1, "c": 2})
    with pytest.raises(AssertionError):
        run(program, {"a": 0, "b": 0, "c": 1})
    with pytest.raises(AssertionError):
        run(program, {"a": 0, "b": 1, "c": 1})


@dataclass(frozen=True)
class AnyFamily:
    """Stands for every kernel; nothing is built here."""

    name: str = "any"
    op: str = "any"


def choose(spec: OpSpec) -> Choice:
    """Linear layers want packed weights and have three variants, of two configurations."""
    if spec.op != "linear":
        return Choice(AnyFamily(), {}, (Variant(1),))
    variants = (Variant(1, {"rows": 1}), Variant(16, {"rows": 4}), Variant(64, {"rows": 1}))
    return Choice(AnyFamily(), {"weight": Panels(16, 1)}, variants)


@pytest.fixture(scope="module")
def lowered(pairs) -> dict[str, Lowered]:
    kinds = ("two layers", "five layers", "tied")
    return {kind: lower(run_passes(pairs(kind).imported.module)[0], choose) for kind in kinds}


def test_steps(lowered):
    functions = lowered["two layers"].functions
    assert functions.keys() == {"layer_0", "forward", "logits"}
    ops = [step.op for step in functions["layer_0"].steps]
    assert ops == [
        "rms_norm",
        "linear",
        "qkv_rope_cache",
        "paged_attention",
        "linear",
        "add_rms_norm",
        "gate_up_silu",
        "linear",
    ]
    calls = [step for step in functions["forward"].steps if isinstance(step, CallStep)]
    assert [call.function for call in calls] == ["layer_0"] * 2
    formal = functions["layer_0"]
    for layer, call in enumerate(calls):
        assert len(call.arguments) == len(formal.inputs) + len(formal.weights) + len(formal.results)
        assert f"kv_{layer}" in call.arguments


def test_every_argument_has_a_place(lowered):
    for program in lowered.values():
        for function in program.functions.values():
            places = {b.name for b in function.buffers}
            places |= {a.buffer for a in (*function.inputs, *function.weights, *function.results)}
            for step in function.steps:
                is_call = isinstance(step, CallStep)
                assert places >= set(step.arguments if is_call else (a.buffer for a in step.arguments))


def test_kernels_do_not_grow_with_depth(lowered):
    two, five = lowered["two layers"], lowered["five layers"]
    assert list(two.kernels) == list(five.kernels)
    assert two.functions["layer_0"] == five.functions["layer_0"]
    assert len(five.weights) == len(two.weights) + 3 * len(two.functions["layer_0"].weights)


def test_symbols_name_kernel_and_variant(lowered):
    """Variants of one configuration share a kernel; calls of another shape do not."""
    kernels = [k for k in lowered["two layers"].kernels.values() if k.spec.op == "linear"]
    numbers = range(len(kernels))
    assert [k.symbols for k in kernels] == [(f"linear_{n}_t1", f"linear_{n}_t16", f"linear_{n}_t1") for n in numbers]
    assert [list(k.distinct()) for k in kernels] == [[f"linear_{n}_t1", f"linear_{n}_t16"] for n in numbers]
    assert all(k.distinct()[k.symbols[0]].min_tokens == 1 for k in kernels)


def test_tied_weights_are_stored_in_each_layout_that_is_read(lowered):
    """The embedding looks rows up in the plain table, the head reads its panels."""
    names = {"lm_head_weight", "model_embed_tokens_weight"}
    layouts = [w.layout for w in lowered["tied"].weights.values() if w.parameter in names]
    assert sorted(layout is not None for layout in layouts) == [False, True]


def test_plan_survives_json(lowered):
    for program in lowered.values():
        plan = Plan(SHAPE, program.functions)
        again = from_json(plan.to_json())
        assert again == plan
        assert again.to_json() == plan.to_json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"functions": {}, "model": {}, "schema": 1}'])
def test_what_is_no_plan(text):
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_json(text)


def test_deterministic(lowered, pairs):
    again = lower(run_passes(pairs("two layers").imported.module)[0], choose)
    first, second = (Plan(SHAPE, p.functions).to_json() for p in (lowered["two layers"], again))
    assert first == second


def test_leftover_operator_is_named(pairs):
    """What no pass turned into an operator of ours is an error, here for want of the last pass."""
    module = pairs("mlp bias").imported.module
    for transform in passes_for()[:-1]:
        module = transform(module)
    with pytest.raises(UnsupportedError, match=r"operator relax\.split .* has no kernel"):
        lower(module, choose)
