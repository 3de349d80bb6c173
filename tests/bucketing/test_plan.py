"""The planner against a search of all plans, the peer against its documentation, and the table of docs/buckets.md."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from tests.conftest import SEED
from vllm_compile.bucketing.padding import padding_of
from vllm_compile.bucketing.plan import plan_buckets
from vllm_compile.bucketing.trace import Request, read_trace, steps_of
from vllm_compile.bucketing.vllm_gaudi import exponential_buckets, exponential_range, first_cover, linear_range
from vllm_compile.cli import main
from vllm_compile.errors import BucketError
from vllm_compile.runtime.buckets import Bucket, Limits, Work
from vllm_compile.runtime.padded_steps import Lengths, batches_of, shape_of

ROOT = Path(__file__).parents[2]
TRACES = ROOT / "benchmarks" / "traces"
SMALL = Limits(max_requests=4, max_tokens=64, max_length=128, block_size=16, cache_blocks=32)
SERVER = Limits(max_requests=64, max_tokens=2048, max_length=4096, block_size=128, cache_blocks=4000)
WORK = Work(token=3.0, block=1.0)


def cost(buckets, steps) -> float:
    """Of all steps, each in the cheapest bucket that covers it."""
    return sum(n * min((WORK.of(b) for b in buckets if b.covers(s)), default=float("inf")) for s, n in steps.items())


def test_the_best_of_all_plans_on_one_axis():
    """Where only the blocks differ, every plan is nested, so the planner must find the best of all."""
    draw = random.Random(SEED)
    steps = {Bucket(4, 1, blocks): draw.randrange(1, 50) for blocks in draw.sample(range(1, 32), 9)}
    for budget in range(3, 9):
        plan = plan_buckets(steps, SMALL, WORK, budget, unforeseen=0.0)
        # The largest buckets come on top: the others cover all steps without them.
        choices = [c for c in combinations(steps, min(budget - 2, len(steps))) if max(steps) in c]
        costs = sorted(cost(choice, steps) for choice in choices)
        assert cost(plan.buckets, steps) == pytest.approx(costs[0])
        assert budget == 3 or costs[0] < costs[-1], "there was something to choose"
        assert len(plan.buckets) <= budget


def test_every_step_within_the_limits_has_a_graph():
    draw = random.Random(SEED)
    steps = {Bucket(2, 1, 3): 5, Bucket(1, 40, 0): 2}
    plan = plan_buckets(steps, SMALL, WORK, 6)
    for _ in range(200):
        batch = draw.randrange(1, SMALL.max_requests + 1)
        decode = Bucket(batch, 1, sum(draw.randrange(1, 9) for _ in range(batch)))
        queries = draw.randrange(2, SMALL.max_tokens + 1)
        prompt = Bucket(1, queries, SMALL.blocks(draw.randrange(0, SMALL.max_length - queries + 1)))
        for step in (decode, prompt):
            found = plan.find(step)
            assert found is not None
            assert found.covers(step)
    assert plan.find(Bucket(5, 1, 1)) is None


def test_more_graphs_never_pad_more_and_all_shapes_pad_nothing():
    steps = steps_of([Request(0, 50, 20), Request(3, 7, 30), Request(9, 100, 5)], SMALL)
    pads = [
        padding_of(plan_buckets(steps, SMALL, WORK, budget, 0.0).find, steps, WORK).work for budget in (3, 6, 12, 60)
    ]
    assert pads == sorted(pads, reverse=True)
    assert pads[0] > pads[-1] == 0


def test_refusals():
    with pytest.raises(BucketError, match="a budget of 1 graphs"):
        plan_buckets({Bucket(1, 1, 1): 1}, SMALL, WORK, 1)
    with pytest.raises(BucketError, match="no steps"):
        plan_buckets({}, SMALL, WORK, 9)
    with pytest.raises(BucketError, match=r"request 2 has 128 \+ 1 tokens"):
        steps_of([Request(0, 1, 1), Request(0, 128, 1)], SMALL)
    with pytest.raises(BucketError, match="request 1 takes 7 KV blocks; the cache has 6 in all"):
        steps_of([Request(0, 96, 2), Request(0, 1, 1)], replace(SMALL, cache_blocks=6))


def test_steps_of_two_requests():
    """Counted by hand: chunks of 64 tokens at most, decodes first, one prefill batch a chunk."""
    steps = steps_of([Request(0, 20, 3), Request(1, 70, 2)], SMALL)
    assert steps == {
        Bucket(1, 20, 0): 1,  # the first prompt
        Bucket(1, 1, 2): 2,  # its 21st and 22nd token, alone at first, then beside the second prompt's rest
        Bucket(1, 63, 0): 1,  # beside the first of them: a token of the step is taken
        Bucket(1, 7, 4): 1,
        Bucket(1, 1, 5): 1,  # the second's 71st
    }


def test_a_last_chunk_of_one_token_decodes():
    """As it does at run time, beside those that decode."""
    requests = [Request(0, 65, 1), Request(1, 1, 2)]
    steps = steps_of(requests, SMALL)
    assert steps == {
        Bucket(1, 64, 0): 1,  # the first prompt but its last token
        Bucket(2, 1, 5 + 1): 1,  # that, and the second prompt
        Bucket(1, 1, 1): 1,
    }
    served = [Lengths([64, 0], [64, 0]), Lengths([1, 1], [65, 1]), Lengths([0, 1], [0, 2])]
    ran = [shape_of(batch, lengths, 16) for lengths in served for batch in batches_of(lengths, together=False)]
    assert Counter(ran) == steps


def test_the_peer_is_as_documented():
    """Ranges that vLLM-Gaudi's documentation and docstrings print."""
    assert exponential_range(128, 128, 2048, 10) == [128, 256, 384, 512, 640, 896, 1152, 1536, 2048]
    assert linear_range(2, 32, 64, 0) == [2, 4, 8, 16, 32, 64]
    assert linear_range(128, 128, 512, 0) == [128, 256, 384, 512]
    assert first_cover([Bucket(1, 1, 8), Bucket(2, 1, 4)], Bucket(1, 1, 3)) == Bucket(1, 1, 8)
    assert len(exponential_buckets(SERVER)) == 106


def test_the_table_in_the_docs(capsys):
    arguments = ["buckets", "compare", "--trace", str(TRACES / "complete_even.json")]
    for name in ("complete_odd", "describe_odd"):
        arguments += ["--held-out", str(TRACES / f"{name}.json")]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert table in (ROOT / "docs" / "buckets.md").read_text()


def test_half_the_graphs_at_less_padding_and_half_the_padding_at_as_many():
    """On the trace that is planned for, and on another of the same kind that the planner has not seen."""
    work = Work(37.2, 6.8)
    traces = [steps_of(read_trace(TRACES / f"complete_{half}.json"), SERVER) for half in ("even", "odd")]
    theirs = exponential_buckets(SERVER)
    for budget, share in ((len(theirs) // 2, 1.0), (len(theirs), 0.5)):
        plan = plan_buckets(traces[0], SERVER, work, budget)
        assert len(plan.buckets) <= budget
        for steps in traces:
            ours = padding_of(plan.find, steps, work)
            peer = padding_of(lambda step: first_cover(theirs, step), steps, work)
            assert ours.missed == peer.missed == 0
            assert ours.work <= share * peer.work
            assert ours.tokens <= share * peer.tokens
            assert ours.blocks <= share * peer.blocks


@pytest.mark.parametrize("wrong", [{"max_requests": 0}, {"max_tokens": 1}, {"block_size": 0}, {"cache_blocks": 0}])
def test_limits_that_serve_nothing(wrong):
    with pytest.raises(BucketError, match="limits must be 1 or more"):
        replace(SMALL, **wrong)
