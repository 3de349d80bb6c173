"""The decoder layers become one function, called once per layer."""

import pytest
import tvm
from tvm import relax

from tests import interpreter
from tests.relax_passes.harness import TOKENS, module, operators, random_arguments
from vllm_compile.errors import UnsupportedError
from vllm_compile.ops import LAYER_BOUNDARY
from vllm_compile.relax_passes.base import Definitions, match_counts, substitute
from vllm_compile.relax_passes.outline_layers import outline_layers

SHAPES = {"x": (1, "T", 8), "w0": (8,), "w1": (8,), "w2": (8,), "head": (8,)}


def model(*layers):
    """Each of `layers` maps (emit, x, weight) to the next x; then a norm of a kind, and the head."""

    def build(emit, x, *weights):
        *scales, head = weights
        for index, (layer, weight) in enumerate(zip(layers, scales, strict=False)):
            x = layer(emit, emit(LAYER_BOUNDARY({"x": x}, index=index)), weight)
        x = emit(relax.op.negative(emit(LAYER_BOUNDARY({"x": x}, index=len(layers)))))
        hidden = emit(LAYER_BOUNDARY({"x": x}, index=len(layers) + 1))
        return emit(relax.op.multiply(hidden, head))

    return module(build, **SHAPES)


def scale(emit, x, weight):
    return emit(relax.op.add(x, emit(relax.op.multiply(x, weight))))


def scale_more(emit, x, weight):
    return emit(relax.op.add(emit(relax.op.multiply(x, weight)), emit(relax.op.multiply(x, weight))))


def scale_by_negative(emit, x, weight):
    return emit(relax.op.multiply(x, emit(relax.op.negative(weight))))


def outlined(before, generator):
    """The functions of the outlined module, which must compute what `main` did."""
    after = outline_layers(before)
    relax.analysis.well_formed(after)
    arguments = random_arguments(before["main"], generator)
    expected = interpreter.run(before, "main", *arguments)
    hidden = interpreter.run(after, "forward", *arguments)
    assert hidden.shape == (1, TOKENS, 8)
    assert interpreter.run(after, "logits", hidden, arguments[-1]).equal(expected)
    return {var.name_hint: function for var, function in after.functions_items()}, match_counts(after)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_equal_layers_share_a_function(depth, generator):
    functions, matches = outlined(model(*[scale] * depth), generator)
    assert matches == {"outline_layers": depth}
    assert functions.keys() == {"forward", "layer_0", "logits"}
    assert operators(functions["forward"]) == {"call": depth, "relax.negative": 1}
    assert operators(functions["layer_0"]) == {"relax.add": 1, "relax.multiply": 1}
    assert operators(functions["logits"]) == {"relax.multiply": 1}


def test_other_layers_get_their_own(generator):
    functions, matches = outlined(model(scale, scale_more, scale), generator)
    assert matches == {"outline_layers": 3}
    assert functions.keys() == {"forward", "layer_0", "layer_1", "logits"}


def test_what_does_not_depend_on_the_input_leaves_the_layer(generator):
    functions, _ = outlined(model(scale_by_negative, scale_by_negative), generator)
    assert operators(functions["layer_0"]) == {"relax.multiply": 1}
    assert operators(functions["forward"]) == {"relax.negative": 3, "call": 2}


def test_without_boundaries():
    before = module(lambda emit, x: emit(relax.op.negative(x)), x=(1, "T", 8))
    with pytest.raises(UnsupportedError, match="no layer boundaries"):
        outline_layers(before)


def test_no_two_parameters_have_one_name(generator):
    """Whatever the variables outside are called that a layer reads."""

    def build(emit, x, *weights):
        *_, head = weights
        x, twice = (emit(relax.op.add(value, value)) for value in (x, head))
        for index in range(3):
            marked = emit(LAYER_BOUNDARY({"x": x}, index=index))
            x = emit(relax.op.multiply(marked, twice)) if index < 2 else marked
        return emit(relax.op.multiply(emit(LAYER_BOUNDARY({"x": x}, index=3)), head))

    before = module(build, **SHAPES)
    variables = [b.var for b in Definitions(before["main"]).bindings]
    renamed = {var: relax.DataflowVar("lv", var.ty) for var in variables[:2]}
    main = before["main"]
    block = relax.DataflowBlock(
        [relax.VarBinding(renamed.get(b.var, b.var), substitute(b.value, renamed)) for b in Definitions(main).bindings]
    )
    body = relax.SeqExpr([block], main.body.body)
    after = outline_layers(tvm.IRModule({"main": relax.Function(main.params, body, main.ret_ty, attrs=main.attrs)}))
    names = [p.name for p in after["layer_0"].params]
    assert len(names) > 1
    assert len(set(names)) == len(names)
