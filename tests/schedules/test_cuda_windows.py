"""Sliding windows and soft caps of CUDA's attention, on the CPU thread by thread, against float64.

See tests/cuda_on_host.  What lies before a window is not there in these tests: blocks of the table are no blocks, rows
of the cache are nan.
"""

import pytest
import torch

from tests.cuda_on_host.prim_func import prepare
from tests.cuda_on_host.runner import AVAILABLE, EmulationError
from vllm_compile import ops
from vllm_compile.ops import paged_attention, qkv_rope_cache
from vllm_compile.schedules.cuda.attention import TILE, most_splits

from .cuda_kernel_cases import sharing
from .test_cuda_on_host import OnHost

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs g++ on x86-64 Linux")

MIXED = ((1, 1), (1, 37), (9, 9), (5, 75), (0, 0), (1, 300), (1, 33))
# Stretches of queries that end within requests, tiles that some of their queries see nothing of.
PROMPTS = ((1, 1), (37, 37), (0, 0), (150, 210), (1, 300), (33, 70))
MANY = (*((count, count + before) for count, before in zip([1, 0, 3, 2] * 10, range(40), strict=True)), (70, 90))
# Operator, attributes, requests, heads: windows within a tile, over several, in a split cache, longer than contexts.
CASES = {
    "window": (ops.PAGED_ATTENTION, {"window": 40}, MIXED, (8, 2, 64, 16)),
    "both": (ops.PAGED_ATTENTION, {"window": 23, "soft_cap": 1.5}, MIXED, (16, 1, 32, 32)),
    "newest": (ops.PAGED_ATTENTION, {"window": 1}, MIXED[:3], (2, 2, 32, 16)),
    "prompts": (ops.PAGED_ATTENTION, {"window": 40, "prompts": 1}, PROMPTS, (8, 2, 64, 16)),
    "prompts_both": (ops.PAGED_ATTENTION, {"window": 23, "soft_cap": 1.5, "prompts": 1}, PROMPTS, (32, 2, 32, 32)),
    "prompts_cap": (ops.PAGED_ATTENTION, {"soft_cap": 0.7, "prompts": 1}, PROMPTS[:4], (14, 2, 64, 16)),
    "prompts_many": (ops.PAGED_ATTENTION, {"window": 12, "prompts": 1}, MANY, (2, 1, 32, 16)),
    # Tiles that some warps see whole, some in part, some not at all, where windows start within them.
    "prompts_128": (ops.PAGED_ATTENTION, {"window": 150, "prompts": 1}, ((1, 40), (97, 419)), (4, 1, 128, 48)),
    "prompts_ungrouped": (ops.PAGED_ATTENTION, {"window": 201, "prompts": 1}, ((140, 420),), (1, 1, 128, 16)),
    "prompts_192": (ops.PAGED_ATTENTION, {"window": 90, "prompts": 1}, ((30, 260),), (3, 1, 192, 32)),
    "prompts_224": (ops.PAGED_ATTENTION, {"window": 70, "prompts": 1}, ((30, 200),), (5, 1, 224, 16)),
    "prompts_themselves": (ops.PAGED_ATTENTION, {"window": 1, "prompts": 1}, ((1, 40), (20, 90)), (7, 1, 64, 16)),
    "prompts_wide_cap": (ops.PAGED_ATTENTION, {"soft_cap": 0.7, "prompts": 1}, ((40, 200),), (2, 1, 256, 16)),
    "prompts_160": (ops.PAGED_ATTENTION, {"window": 70, "prompts": 1}, PROMPTS[2:4], (11, 1, 160, 16)),
    "prompts_96": (ops.PAGED_ATTENTION, {"window": 70, "prompts": 1}, PROMPTS[2:], (2, 2, 96, 64)),
    "prompts_wide": (ops.PAGED_ATTENTION, {"window": 40, "prompts": 1}, PROMPTS[2:5], (6, 2, 256, 128)),
    "rope_window": (ops.QKV_ROPE_ATTENTION, {"window": 40}, MIXED, (8, 2, 64, 16)),
    "rope_both": (ops.QKV_ROPE_ATTENTION, {"window": 23, "soft_cap": 1.5}, MIXED, (16, 1, 32, 32)),
    "rope_cap": (ops.QKV_ROPE_ATTENTION, {"soft_cap": 0.7}, MIXED[:4], (3, 1, 64, 16)),
    "rope_split": (ops.QKV_ROPE_ATTENTION, {"window": 700}, ((1, 1500), (1, 650)), (8, 2, 64, 32)),
}
# A block that request 0 fills in this step, and that the others have for a part of their prefix.
SHARED = {
    "decode": (ops.QKV_ROPE_ATTENTION, {"window": 17}, ((1, 32), (1, 33), (20, 52), (1, 300)), (8, 2, 64, 16)),
    "straddling": (ops.QKV_ROPE_ATTENTION, {"window": 17}, ((2, 17), (1, 33), (1, 40)), (8, 2, 64, 16)),
    "prefill": (ops.QKV_ROPE_ATTENTION, {"window": 17}, ((32, 32), (1, 40), (16, 48), (1, 60)), (8, 2, 64, 16)),
}
GONE = 1 << 20  # no block of the cache


def beyond(inputs, window, gone=GONE):
    """The same cache without what is before the windows of each request's queries: its blocks, then its rows."""
    kv, table, size = inputs["kv"].clone(), inputs["block_table"].clone(), inputs["kv"].shape[2]
    queries, unused = inputs["query_start_loc"].diff().tolist(), torch.ones(kv.shape[0], size, dtype=torch.bool)
    for request, length in enumerate(inputs["seq_lens"].tolist()):
        first = max(length - queries[request] + 1 - window, 0) if window else 0
        for position in range(first, length):
            unused[table[request, position // size], position % size] = False
        table[request, : first // size] = gone
    kv.transpose(1, 2)[unused] = float("nan")
    return inputs | {"kv": kv, "block_table": table}


def expected(op, inputs, attributes):
    """out [T, H, D] in float64, of bf16 queries."""
    given = {name: tensor.clone() for name, tensor in inputs.items()}
    options = dict(attributes)
    if op is ops.QKV_ROPE_ATTENTION:
        rotated = [given.pop(name) for name in ("qkv", "cos", "sin")]
        sizes = [options.pop(name) for name in ("num_heads", "num_kv_heads", "head_dim")]
        given["q"] = qkv_rope_cache.reference(*rotated, given["kv"], given.pop("slot_mapping"), *sizes)
    given |= {name: given[name].double() for name in ("q", "kv")}
    return paged_attention.reference(**given, **options)


def sample(generator, case):
    """Every token is cached, the values where windows begin are large."""
    op, options, lengths, sizes = case
    inputs, attributes = op.sample(generator, torch.bfloat16, lengths, *sizes)
    size, table = inputs["kv"].shape[2], inputs["block_table"]
    if op is ops.QKV_ROPE_ATTENTION:
        positions = [(r, at) for r, (queries, length) in enumerate(lengths) for at in range(length - queries, length)]
        slots = [int(table[r, at // size]) * size + at % size for r, at in positions]
        inputs["slot_mapping"] = torch.tensor(slots, dtype=torch.int64)
    window = options.get("window", 0)
    for request, (_, length) in enumerate(lengths):
        for position in range(max(length - window - 1, 0), min(length - window + 1, length)) if window else ():
            inputs["kv"][table[request, position // size], :, position % size, sizes[2] :] *= max(window / 16, 1)
    return op, inputs, attributes | options


def differs(op, actual, reference):
    tolerance = op.tolerance["bfloat16"]
    return not torch.allclose(actual.double(), reference, rtol=tolerance.rtol, atol=tolerance.atol)


def check(call, given, reference):
    """Every kernel in every order of threads; returns a result."""
    for kernel in call.kernels:
        results = [call.run(given, kernel, seed=seed)[0] for seed in range(3)]
        assert not differs(call.op, results[0], reference)
        assert all(torch.equal(result, results[0]) for result in results[1:])
    return results[0]


@pytest.mark.parametrize("case", CASES)
def test_windows_and_caps(case, generator):
    """And a window that is one token longer or shorter is noticed, as is a cap that is left out."""
    op, inputs, attributes = sample(generator, CASES[case])
    call = OnHost(op, inputs, attributes)
    prepare(call.kernels)
    call.expected()
    window = attributes.get("window", 0)
    result = check(call, beyond(inputs, window), expected(op, inputs, attributes)[call.rows])
    wrong = [{"window": window + by} for by in (1, -1) if window and window + by > 0]
    wrong += [{"soft_cap": 0.0}] if "soft_cap" in attributes else []
    assert wrong
    for changes in wrong:
        assert differs(op, result, expected(op, inputs, attributes | changes)[call.rows]), changes


def growing(inputs, head_dim, steps):
    """Keys that are a query times a step of its token's: scores along a context that are known; in bf16."""
    kv, queries = inputs["kv"].clone(), inputs["q"].double()
    keys = queries[-1, 0] / queries[-1, 0].norm() ** 2 * head_dim**0.5
    table, size = inputs["block_table"][0], kv.shape[2]
    for position, step in enumerate(steps):
        kv[table[position // size], :, position % size, :head_dim] = (keys * step).to(kv.dtype)
    return inputs | {"kv": kv}


@pytest.mark.parametrize(("head_dim", "window"), [(64, 0), (128, 200), (256, 0)])
@pytest.mark.parametrize("rise", [-30.0, 0.0, 3.0, 5.0, 60.0], ids="{:g} a tile".format)
def test_scores_that_rise_and_fall(rise, head_dim, window, generator):
    """By less and by more than what prompts' sums are kept for, from the first tile to the last; 240 is a lot.

    Rows of other queries rise otherwise.
    """
    options = {"window": window, "prompts": 1} if window else {"prompts": 1}
    op = ops.PAGED_ATTENTION
    inputs, attributes = op.sample(generator, torch.bfloat16, ((5, 320),), 2, 1, head_dim, 16)
    attributes |= options
    steps = [rise * (position // 64) + (position % 7) / 4 - 3 for position in range(320)]
    inputs = growing(inputs, head_dim, steps)
    call = OnHost(op, inputs, attributes)
    call.expected()
    result = check(call, beyond(inputs, window), expected(op, inputs, attributes)[call.rows])
    flat = growing(inputs, head_dim, [step * 0.5 for step in steps])
    assert differs(op, result, expected(op, flat, attributes)[call.rows])


@pytest.mark.parametrize("case", SHARED)
def test_shared_blocks_within_windows(case, generator):
    """And rows that are not filled would be noticed by the others."""
    op, inputs, attributes = sample(generator, SHARED[case])
    inputs = sharing(0, 0, 2)(inputs)
    call = OnHost(op, inputs, attributes)
    call.expected()
    given = beyond(inputs, attributes["window"])
    result = check(call, given, expected(op, inputs, attributes)[call.rows])
    filler, unfilled = int(inputs["query_start_loc"][1]), inputs["slot_mapping"].clone()
    unfilled[:filler] = -1
    stale = expected(op, inputs | {"slot_mapping": unfilled}, attributes)[call.rows]
    assert differs(op, result[filler:], stale[filler:])


@pytest.mark.parametrize("case", ["window", "rope_window", "prompts"])
def test_tokens_before_the_window_are_not_there(case, generator):
    """Negative control: a window one tile longer meets blocks that are none."""
    op, inputs, attributes = sample(generator, CASES[case])
    call = OnHost(op, inputs, attributes | {"window": attributes["window"] + TILE})
    call.expected()
    with pytest.raises(EmulationError, match="kv"):
        call.run(beyond(inputs, attributes["window"]), call.kernels[0])


@pytest.mark.parametrize(("window", "most"), [(4096, 33), (512, 5), (24, 1), (1, 1), (0, 64)])
def test_no_more_splits_than_a_window_has_work_for(window, most):
    """Blocks of a grid for one request, of stretches of 8 tiles."""
    assert most_splits(window, 8) == most
