"""The blocks of a Transformer, found in its graph: how many of each a step goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vllm_compile.ops.qkv_rope_attention import attention_of

from .graph import Call

NORMS = {"rms_norm", "add_rms_norm", "layer_norm"}
ACTIVATIONS = {"elementwise", "silu_mul"}  # operators that can stand between the two products of a feed-forward block
PRODUCTS = {"linear", "gate_up_silu", "expert_linear", "expert_gate_up_silu"}
MIXTURE = "expert_gate_up_silu"


def find_blocks(unfused: Sequence[Call], fused: Sequence[Call], hidden_size: int) -> dict[str, int]:
    """Blocks by name, of a model before its layers are outlined and after all passes.

    A feed-forward block is a product of what a gated product, or an activation of a product, gives.  A residual
    add is one of x and of what was made of x, as wide as the residual stream.
    """

    def count(matches: Callable[[Call], bool]) -> int:
        return sum(call.times for call in fused if matches(call))

    return {
        "attention": count(lambda call: attention_of(call.spec) is not None),
        "feed-forward": count(lambda call: _ends_feed_forward(fused, call)),
        "mixture of experts": count(lambda call: call.op == MIXTURE),
        "norms": count(lambda call: call.op in NORMS),
        "residual adds": _residual_adds(unfused, hidden_size),
        "matrix products": count(lambda call: call.op in PRODUCTS),
    }


def _ends_feed_forward(calls: Sequence[Call], call: Call) -> bool:
    same = [other for other in calls if other.function == call.function]

    def makers(of: Call) -> list[Call]:
        return [same[number] for made_by in of.reads.values() for number in made_by]

    def is_activation(of: Call) -> bool:
        return of.op in ACTIVATIONS and any(maker.op == "linear" for maker in makers(of))

    inputs = [same[number] for number in call.reads.get("x", ())]
    return call.op == "linear" and any(before.op == "gate_up_silu" or is_activation(before) for before in inputs)


def _residual_adds(calls: Sequence[Call], width: int) -> int:
    """`calls` is one function's, in order."""
    before: list[int] = []  # a bit set for each call: the calls that it depends on
    found = 0
    for call in calls:
        operands = [_bits(made_by) for made_by in call.reads.values()]
        depends = [_union(before[i] for i in made_by) for made_by in call.reads.values()]
        before.append(_union([*operands, *depends]))
        if (
            call.op == "relax.add"
            and len(operands) == 2
            and not call.weights
            and call.spec.outputs[0].size(-1) == width
        ):
            (a, b), (under_a, under_b) = operands, depends
            found += bool(a) and bool(b) and bool(a & under_b or b & under_a)
    return found


def _bits(numbers: Sequence[int]) -> int:
    return _union(1 << number for number in numbers)


def _union(sets: Iterable[int]) -> int:
    total = 0
    for bits in sets:
        total |= bits
    return total
