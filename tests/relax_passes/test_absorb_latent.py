"""A latent vector is cached in the place of the keys and values that are made of it."""

import pytest
import torch
from tvm import relax, tirx

from tests import interpreter
from tests.relax_passes.harness import own_operators
from vllm_compile.ops import CAUSAL_ATTENTION, LINEAR
from vllm_compile.paged_batch import PagedBatch
from vllm_compile.relax_passes.absorb_latent import absorb_latent
from vllm_compile.relax_passes.base import clean, match_counts
from vllm_compile.relax_passes.page_kv_cache import page_kv_cache
from vllm_compile.runtime.plan import ModelShape

HEADS, KEY, ROTATED, VALUE, RANK = 4, 12, 6, 10, 16
ABSORBED = {"kv_cache_write": 1, "head_linear": 2, "paged_attention": 1}
SHAPES = {
    "q": [1, HEADS, "T", KEY],
    "q_rotated": [1, HEADS, "T", ROTATED],
    "latent": [1, 1, "T", RANK],
    "k_rotated": [1, 1, "T", ROTATED],
    "weight": [HEADS * (KEY + VALUE), RANK],
}


def attention(order=("k", "v"), other_latent=False, bias=False, heads_of_k_rotated=1, rank=RANK):
    """As DeepSeek-V2 writes it, a function of the serving signature."""
    tokens = tirx.Var("T", "int64")
    sizes = SHAPES | {"k_rotated": [1, heads_of_k_rotated, "T", ROTATED], "latent": [1, 1, "T", rank]}
    sizes |= {"weight": [HEADS * (KEY + VALUE), rank], "other": sizes["latent"], "bias": [HEADS * (KEY + VALUE)]}

    def parameter(name, shape, dtype="float32"):
        return relax.Var(name, relax.TensorType([tokens if dim == "T" else dim for dim in shape], dtype))

    ids, positions = parameter("input_ids", ["T"], "int32"), parameter("positions", ["T"], "int64")
    given = {name: parameter(name, shape) for name, shape in sizes.items()}
    builder = relax.BlockBuilder()
    with builder.function("main", [ids, positions, *given.values()]):
        with builder.dataflow():

            def made(latent):
                inputs = {"x": latent, "weight": given["weight"], "bias": given["bias"] if bias else None}
                product = builder.emit(LINEAR(inputs))
                rows = builder.emit(relax.op.reshape(product, [1, tokens, HEADS, KEY + VALUE]))
                by_head = builder.emit(relax.op.permute_dims(rows, [0, 2, 1, 3]))
                where = [KEY] if order == ("k", "v") else [VALUE]
                split = builder.emit(relax.op.split(by_head, where, axis=-1))
                return {part: builder.emit(relax.TupleGetItem(split, i)) for i, part in enumerate(order)}

            parts = made(given["latent"])
            if other_latent:
                parts["v"] = made(given["other"])["v"]
            shared = builder.emit(relax.op.broadcast_to(given["k_rotated"], [1, HEADS, tokens, ROTATED]))
            inputs = {
                "q": builder.emit(relax.op.concat([given["q"], given["q_rotated"]], axis=-1)),
                "k": builder.emit(relax.op.concat([parts["k"], shared], axis=-1)),
                "v": parts["v"],
            }
            out = builder.emit_output(CAUSAL_ATTENTION(inputs, scale=0.3, layer=0, soft_cap=4.0))
        builder.emit_func_output(out)
    return page_kv_cache(clean(builder.get()))


def run(module, generator, lengths=(9, 5)):
    """The result for two requests: all but two of their tokens at once, then those."""
    parameters = module["main"].params
    _, kv_heads, _, width = next(p for p in parameters if p.name == "kv_0").ty.shape.values
    batch = PagedBatch(ModelShape(1, HEADS, int(kv_heads), int(width), 1, 1, 99, "float32", 0), lengths)
    weights = {
        p.name: torch.randn([int(d) for d in p.ty.shape.values], generator=generator)
        for p in parameters
        if p.name in ("weight", "bias")
    }
    results, begin = [], [0] * len(lengths)
    for end in ([n - 2 for n in lengths], lengths):
        step = batch.step(begin, end)
        given = {**step, **weights, "input_ids": step["positions"].int(), "kv_0": batch.kv[0]}
        for parameter in parameters:
            if parameter.name not in given:
                sizes = [
                    sum(end) - sum(begin) if isinstance(d, tirx.Var) else int(d) for d in parameter.ty.shape.values
                ]
                given[parameter.name] = torch.randn(sizes, generator=generator)
        results.append(interpreter.run(module, "main", *(given[p.name] for p in parameters)))
        begin = end
    return torch.cat(results, dim=1)


def absorbed(before, generator):
    """The module after the pass, and its matches; it computes the same, decoding from its own cache too."""
    after = absorb_latent(before)
    relax.analysis.well_formed(after)
    seed = int(torch.randint(1 << 30, (1,), generator=generator))
    want, got = (run(module, torch.Generator().manual_seed(seed)) for module in (before, after))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    return after["main"], match_counts(after)["absorb_latent"]


def test_the_latent_vector_is_cached(generator):
    after, matches = absorbed(attention(), generator)
    assert matches == 1
    assert own_operators(after) == ABSORBED
    cache = next(p for p in after.params if p.name == "kv_0")
    assert [int(cache.ty.shape.values[axis]) for axis in (1, 3)] == [1, RANK + ROTATED]


@pytest.mark.parametrize(
    "changes",
    [
        {"order": ("v", "k")},
        {"other_latent": True},
        {"bias": True},
        {"heads_of_k_rotated": HEADS},
        {"rank": HEADS * (KEY + ROTATED + VALUE)},
    ],
    ids=["values first", "two latents", "a bias", "rotated by head", "a latent that is no smaller"],
)
def test_keys_and_values_of_another_kind(changes, generator):
    before = attention(**changes)
    after, matches = absorbed(before, generator)
    assert matches == 0
    assert own_operators(after) == own_operators(before["main"])


def test_the_comparison_sees_another_value(generator):
    """Negative control: of a latent vector of its own, the values differ."""
    seed = int(torch.randint(1 << 30, (1,), generator=generator))
    one, two = (run(attention(other_latent=o), torch.Generator().manual_seed(seed)) for o in (False, True))
    assert (one - two).abs().max() > 0.01
