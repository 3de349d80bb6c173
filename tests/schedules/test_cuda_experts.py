"""CUDA's mixtures of experts on the CPU, thread by thread, against float64: router, linear layers of experts.

See tests/cuda_on_host.
"""

import re
import shutil

import pytest
import torch

from tests.cuda_on_host import runner
from tests.cuda_on_host.prim_func import prepare, run_kernel
from tests.cuda_on_host.runner import AVAILABLE
from tests.cuda_on_host.runner import run as run_function
from vllm_compile import ops
from vllm_compile.schedules.cuda.build import build_library
from vllm_compile.schedules.select import choose
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets import cuda

from . import harness
from .sass import loads_before_waiting, sass_of

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++ on x86-64 Linux")
TARGET = cuda.for_chip()
OPERATORS = {"linear": ops.EXPERT_LINEAR, "gate_up_silu": ops.EXPERT_GATE_UP_SILU}
EXPERTS, TOP_K = 12, 3
WIDE = 128  # outputs of an expert (and as many gates): whole warpgroups


def kernels_of(op, inputs, attributes):
    spec = harness.op_spec(op, inputs, attributes)
    choice = choose(spec, TARGET)
    kernels = [choice.family.build(spec, variant.config, TARGET) for variant in choice.variants]
    prepare(kernels)
    return kernels


def run(kernel, inputs, outputs, seed=None, early=(), together=1):
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    results = [torch.full_like(out, harness.POISON[str(out.dtype).removeprefix("torch.")]) for out in outputs]
    report = run_kernel(kernel, *given.values(), *results, early=early, together=together, seed=seed)
    assert report.launched == report.waited == (1, 1)
    return tuple(results)


def routed(logits, top_k=TOP_K):
    experts, _, order, ends = ops.ROUTE.reference(logits, top_k, normalise=True)
    return {"experts": experts, "order": order, "ends": ends}


def expected(name, inputs):
    """[T, k, N] in float64; gates and ups are rounded to bf16 before they meet, as is their silu."""
    x, experts, weight = inputs["x"], inputs["experts"].long(), inputs["weight"]
    rows = x[:, None].expand(-1, experts.shape[1], -1) if x.dim() == 2 else x
    out = torch.stack(
        [torch.stack([weight[e].double() @ row.double() for e, row in zip(*pair, strict=True)]) for pair in
         zip(experts, rows, strict=True)]
    )  # fmt: skip
    if name == "linear":
        return out
    gate, up = out.bfloat16().double().chunk(2, -1)
    return (gate * gate.sigmoid()).bfloat16().double() * up


def differs(name, actual, reference):
    tolerance = OPERATORS[name].tolerance["bfloat16"]
    return not torch.allclose(actual.double(), reference, rtol=tolerance.rtol, atol=tolerance.atol)


def sample(name, generator, tokens, N=WIDE, logits=None):
    """Experts that nobody chose are nan."""
    inputs, _ = OPERATORS[name].sample(generator, torch.bfloat16, tokens, 192, N, EXPERTS, TOP_K)
    if logits is not None:
        inputs |= routed(logits)
    unused = torch.ones(EXPERTS, dtype=torch.bool)
    unused[inputs["experts"].flatten().long()] = False
    inputs["weight"][unused] = float("nan")
    return inputs


@pytest.fixture(scope="module", params=OPERATORS)
def built(request):
    name = request.param
    inputs = sample(name, torch.Generator(), 2)
    return name, kernels_of(OPERATORS[name], inputs, {})


def test_every_variant_in_every_order_of_threads(built, generator):
    """Fewer choices than experts, and more; a token's result has the same bits alone and among others."""
    name, kernels = built
    for tokens in (1, 3, 21):
        inputs = sample(name, generator, tokens)
        reference = expected(name, inputs)
        for kernel in kernels:
            results = [run(kernel, inputs, [reference.bfloat16()], seed)[0] for seed in range(2)]
            assert not differs(name, results[0], reference)
            assert torch.equal(*results)
            alone = {**inputs, "x": inputs["x"][:1], **routed_as(inputs["experts"][:1])}
            assert torch.equal(run(kernel, alone, [results[0][:1]])[0], results[0][:1])


def routed_as(experts):
    by_expert, order = experts.flatten().sort(stable=True)
    ends = torch.searchsorted(by_expert, by_expert, right=True)
    return {"experts": experts, "order": order.view(experts.shape).int(), "ends": ends.view(experts.shape).int()}


@pytest.mark.parametrize("tokens", [2, 40, 70])
def test_all_tokens_to_the_same_experts(built, tokens, generator):
    """More of a group than are multiplied together: of 70 tokens, two tiles of the widest kernel."""
    name, kernels = built
    logits = torch.randn(tokens, EXPERTS, generator=generator)
    logits[:, [0, 7, EXPERTS - 1]] += 50
    inputs = sample(name, generator, tokens, logits=logits)
    reference = expected(name, inputs)
    for kernel in (kernels[0], kernels[-1]) if tokens < 70 else kernels[-1:]:
        results = [run(kernel, inputs, [reference.bfloat16()], seed)[0] for seed in range(2)]
        assert not differs(name, results[0], reference)
        assert torch.equal(*results)
    if tokens == 70:  # a row that the second tile does not take is noticed
        order = inputs["order"].clone()
        order.view(-1)[65] = order.view(-1)[0]
        assert differs(name, run(kernel, inputs | {"order": order}, [reference.bfloat16()])[0], reference)


STORE = """
void store(vllm_compile::Group group, int* found) {
  int* const to = found + blockIdx.x * 3;
  if (threadIdx.x == 0) to[0] = group.expert, to[1] = group.begin, to[2] = group.count;
}
"""


def found_by(function, given, places):
    """(expert, first place, count) that each thread block finds with a function of rows.cuh."""
    found = torch.full((places, 3), -1, dtype=torch.int32)
    run_function(
        "rows.cuh",
        f"store(vllm_compile::{function}, found)",
        grid=places,
        block=32,
        arguments={**given, "found": found, "slots": given["order"].numel()},
        source=STORE,
    )
    assert found[:, 2].min() >= 0
    return found


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (15, 128, 8), (16, 128, 8), (1700, 12, 3)])
def test_every_group_is_found(tokens, experts, top_k, generator):
    """As many as there may be: all groups, in order, and places without one."""
    logits = torch.randn(tokens, experts, generator=generator)
    logits[:, [0, experts // 2, experts - 1]] -= 9  # nobody's
    given = routed(logits, top_k)
    slots = tokens * top_k
    find = f"find_group<{experts}>(experts, order, ends, slots, blockIdx.x)"
    found = found_by(find, given, min(slots, experts))
    chosen, counts = given["experts"].flatten().unique(return_counts=True)
    groups = torch.stack([chosen, counts.cumsum(0) - counts, counts], 1).tolist()
    assert [group for group in found.tolist() if group[2]] == groups
    if slots >= experts:
        assert not found[[0, experts // 2, experts - 1], 2].any()


@pytest.mark.parametrize("share", ["even", "random", "one", "whole"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(9, 128, 8), (17, 128, 8), (257, 12, 3), (900, 128, 8)])
def test_every_tile_is_found(share, tokens, experts, top_k, generator):
    """Each once, by as many thread blocks as there are: of groups of all sizes, and of whole tiles."""
    if share == "even":
        chosen = torch.arange(tokens * top_k).view(tokens, top_k)
    elif share == "whole":  # groups begin and end with multiples of tiles
        chosen = torch.arange(-(-tokens // 16) * top_k).view(-1, top_k).repeat_interleave(16, 0)
    else:
        logits = torch.randn(tokens, experts, generator=generator) * (4 if share == "random" else 1)
        logits[:, experts - 2] += 50 if share == "one" else 0
        chosen = routed(logits, top_k)["experts"]
    given = routed_as(chosen.remainder(experts).int())
    slots = given["order"].numel()
    groups, counts = given["experts"].flatten().unique(return_counts=True)
    begins = counts.cumsum(0) - counts
    for width in (8, 16):
        find = f"find_tile<{experts}, {width}>(experts, order, ends, slots, blockIdx.x, gridDim.x)"
        found = found_by(find, given, min(slots, experts) + (slots - 1) // width)
        expected = [
            [expert, begin + at, min(width, count - at)]
            for expert, begin, count in zip(*(t.tolist() for t in (groups, begins, counts)), strict=True)
            for at in range(0, count, width)
        ]
        assert sorted(tile for tile in found.tolist() if tile[2]) == expected


@pytest.mark.parametrize(("tokens", "places"), [(1, 8), (8, 64), (64, 128 + 63), (65, 128 + 32), (8192, 128 + 1023)])
def test_thread_blocks_of_prompts(tokens, places, monkeypatch):
    """Of 128 experts, 8 for a token, in tiles of 8, 8, 8, 16 and 64: for the tiles that there may be, and no more."""
    inputs, _ = ops.EXPERT_LINEAR.sample(torch.Generator(), torch.bfloat16, 1, 64, WIDE, 128, 8)
    spec = harness.op_spec(ops.EXPERT_LINEAR, inputs, {})
    choice = choose(spec, TARGET)
    variant = next(variant for variant in reversed(choice.variants) if variant.min_tokens <= tokens)
    tensors = [t if name == "weight" else t.expand(tokens, *t.shape[1:]).contiguous() for name, t in inputs.items()]
    grids = []
    monkeypatch.setattr(runner, "run", lambda *_, grid, **__: grids.append(grid))
    out = torch.empty(tokens, 8, WIDE, dtype=torch.bfloat16)
    run_kernel(choice.family.build(spec, variant.config, TARGET), *tensors, out)
    assert grids[0][1:] == [places, 1]


def test_wrong_experts_and_weights_are_noticed(built, generator):
    name, kernels = built
    inputs = sample(name, generator, 5)
    inputs["weight"] = inputs["weight"].nan_to_num(0.5)
    reference = expected(name, inputs)
    other = inputs["experts"].clone()
    other[-1, -1] = next(e for e in range(EXPERTS) if e not in other[-1].tolist())
    changed = inputs["weight"].clone()
    changed[inputs["experts"][0, 0]] *= -1
    for wrong in (routed_as(other), {"weight": changed}, {"order": inputs["order"].flip(0)}):
        assert differs(name, run(kernels[0], inputs | wrong, [reference.bfloat16()])[0], reference)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 8, 2), (7, 8, 2), (40, 40, 3), (19, 128, 8), (150, 12, 2)]
)
@pytest.mark.parametrize("normalise", [True, False])
def test_router(tokens, experts, top_k, normalise, generator):
    """Of 150 tokens three thread blocks choose, at the same time and in any order."""
    op, attributes = ops.ROUTE, {"top_k": top_k, "normalise": normalise}
    logits = torch.randn(tokens, experts, generator=generator).bfloat16()
    if tokens > 1:
        logits = ((logits * 2).round() / 2).clamp(max=0)  # many are equal: zeros, negative ones among them
    reference = harness.results(op, {"logits": logits}, attributes)
    for kernel in kernels_of(op, {"logits": logits}, attributes):
        for seed in range(2):
            harness.assert_matches(op, run(kernel, {"logits": logits}, reference, seed, together=3), reference)
    changed = logits.clone()
    changed[-1, reference[0][-1, 0]] -= 100  # the first choice is none
    with pytest.raises(AssertionError):
        harness.assert_matches(op, run(kernel, {"logits": changed}, reference), reference)


def test_router_of_nan(generator):
    """A row that is nan goes to experts that there are; others are not disturbed."""
    attributes, logits = {"top_k": 3, "normalise": True}, torch.randn(6, 40, generator=generator).bfloat16()
    logits[2], logits[4, 7] = float("nan"), float("nan")
    reference = harness.results(ops.ROUTE, {"logits": logits}, attributes)
    for kernel in kernels_of(ops.ROUTE, {"logits": logits}, attributes):
        experts, scores, order, ends = run(kernel, {"logits": logits}, reference)
        for ours, theirs in ((experts, reference[0]), (order, reference[2]), (ends, reference[3])):
            assert torch.equal(ours, theirs)
        assert scores.isnan().any(1).tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize(("N", "optional"), [(8, ()), (1, ()), (60, ("bias", "residual"))])
def test_linear_layers_of_few_rows(N, optional, generator):
    inputs, _ = ops.LINEAR.sample(generator, torch.bfloat16, 3, 264, N)
    inputs = {name: inputs[name] for name in ("x", "weight", *optional)}
    inputs["x"][:, -1] = inputs["weight"][:, -1] = 1  # so that a change of the other shows
    reference = harness.results(ops.LINEAR, inputs, {})
    (kernel,) = kernels_of(ops.LINEAR, inputs, {})
    actual = run(kernel, inputs, reference, early={"weight"})
    harness.assert_matches(ops.LINEAR, actual, reference)
    for name in inputs:
        changed = inputs[name].clone()
        changed.view(-1)[-1] += 4
        with pytest.raises(AssertionError):
            harness.assert_matches(
                ops.LINEAR, run(kernel, inputs | {name: changed}, reference, early={"weight"}), reference
            )


def mixtral(E=8, top_k=2, hidden=4096, width=14336):
    """Calls of one layer's experts."""
    T = Sym.TOKENS
    numbers = [TensorSpec((T, top_k), dtype) for dtype in ("int32", "float32", "int32", "int32")]
    groups = tuple((name, TensorSpec((T, top_k), "int32")) for name in ("experts", "order", "ends"))

    def call(op, x, weight, out, inputs=(), attributes=()):
        given = ("x", TensorSpec(x, "bfloat16")), *inputs, ("weight", TensorSpec(weight, "bfloat16"))
        return OpSpec(op, given, (TensorSpec(out, "bfloat16"),), attributes)

    return {
        "rows": call("linear", (T, hidden), (E, hidden), (T, E)),
        "route": OpSpec(
            "route",
            (("logits", TensorSpec((T, E), "bfloat16")),),
            tuple(numbers),
            (("normalise", True), ("top_k", top_k)),
        ),
        "gates": call("expert_gate_up_silu", (T, hidden), (E, 2 * width, hidden), (T, top_k, width), groups),
        "downs": call("expert_linear", (T, top_k, width), (E, hidden, width), (T, top_k, hidden), groups),
    }


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_machine_code(tmp_path):
    """Weights are streamed 16 bytes at a time, past the tensor cores; nothing spills."""
    kernels = {}
    for name, spec in mixtral().items():
        choice = choose(spec, TARGET)
        few, many = choice.variants[0], choice.variants[-1]
        kernels |= {
            f"{name}_{n}": choice.family.build(spec, v.config, TARGET) for n, v in (("few", few), ("many", many))
        }
    resources = build_library(kernels, TARGET, tmp_path / "kernels.so")
    assert resources.keys() == kernels.keys()
    assert not any(used.spilled_bytes or used.serialized for used in resources.values())
    code = sass_of(tmp_path / "kernels.so")
    assert not any(loads_before_waiting(text) for text in code.values())
    products = {"gates_few": "HMMA.16816.F32.BF16", "gates_many": "HGMMA.64x64x16.F32.BF16"}
    products |= {name.replace("gates", "downs"): product for name, product in products.items()}
    for symbol, product in products.items():
        assert product in code[symbol], symbol
        assert "LDGSTS.E.BYPASS.LTC128B.128" in code[symbol], symbol
        assert not re.search(r"LDGSTS(?!\.E\.BYPASS\S*\.128)", code[symbol]), symbol
        # Which weights is known when the router is done: nothing is asked for before.
        assert code[symbol].index("ACQBULK") < code[symbol].index("LDGSTS"), symbol
    assert code["rows_few"].count("LDG.E.128") >= 16, "eight of x and of the weight are under way"


def test_variants_of_mixtral():
    """Tokens of a group that read its weight together; experts of 8 choices in 128 have fewer."""
    mixtral, qwen_3 = {1: 8, 17: 16, 33: 32, 65: 64}, {1: 8, 65: 16, 129: 32, 257: 64}
    for experts, top_k, widths in ((8, 2, mixtral), (128, 8, qwen_3)):
        inputs, _ = ops.EXPERT_LINEAR.sample(torch.Generator(), torch.bfloat16, 1, 64, 4096, experts, top_k)
        variants = choose(harness.op_spec(ops.EXPERT_LINEAR, inputs, {}), TARGET).variants
        assert {v.min_tokens: v.config.get("tokens", 8 * v.config.get("token_tiles", 0)) for v in variants} == widths
