"""Residuals that lie where their sums will: which may, and that nothing else changes."""

import pytest

from vllm_compile.runtime.plan import Argument, CallStep, KernelStep, Large, VendorCall
from vllm_compile.spec import Sym, TensorSpec
from vllm_compile.sums_in_place import add_in_place

SPEC = TensorSpec((Sym.TOKENS, 8), "bfloat16")


def kernel(*names, large=None):
    return KernelStep("op", "family", ((1, "k"),), tuple(Argument(name, SPEC) for name in names), large)


def product(residual, out, function="linear", x="x", **others):
    """A linear layer with a residual, of ours and of a vendor's."""
    named = {"x": x, "weight": "w", **others, "residual": residual, "out": out}
    call = VendorCall(function, tuple((name, Argument(buffer, SPEC)) for name, buffer in named.items()))
    return kernel(*named.values(), large=Large(65, False, (call,)))


STEPS = (kernel("hidden", "x", "r"), CallStep("layer", ("x", "r", "y")), product("r", "total"))


def test_residual_and_sum_are_one():
    assert add_in_place({"x", "r", "y"}, STEPS) == (
        kernel("hidden", "x", "total"),
        CallStep("layer", ("x", "total", "y")),
        product("total", "total"),
    )


def test_sum_after_sum():
    steps = (kernel("hidden", "a"), product("a", "b"), kernel("b", "x"), product("b", "c"))
    expected = (kernel("hidden", "c"), product("c", "c"), kernel("c", "x"), product("c", "c"))
    assert add_in_place({"a", "b"}, steps) == expected


@pytest.mark.parametrize(
    ("scratch", "steps"),
    {
        "the caller's": ({"x", "y"}, STEPS),
        "read later": ({"x", "r", "y"}, (*STEPS, kernel("r", "z"))),
        "read by a vendor later": ({"x", "r", "y"}, (*STEPS, product("r", "z", bias="b"))),
        "the result is there before": ({"x", "r", "y"}, (kernel("total", "x"), *STEPS)),
        "a bias is added, too": ({"r"}, (kernel("hidden", "r"), product("r", "total", bias="b"))),
        "it is multiplied, too": ({"r"}, (kernel("hidden", "r"), product("r", "total", x="r"), kernel("total", "y"))),
        "another function": ({"r"}, (kernel("hidden", "r"), product("r", "total", function="paged_attention"))),
        "no vendor": ({"r"}, (kernel("hidden", "r"), kernel("x", "w", "r", "total"))),
    }.values(),
)
def test_others_stay_where_they_are(scratch, steps):
    assert add_in_place(scratch, steps) == steps
