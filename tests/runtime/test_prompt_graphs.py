"""Steps with prompts that are replayed, beside the same steps run at once: hidden states, and what is in the caches."""

from __future__ import annotations

import pytest
import torch

from vllm_compile.accuracy import relative_error
from vllm_compile.paged_batch import BLOCK_SIZE, PagedBatch
from vllm_compile.runtime.program import Program, load
from vllm_compile.runtime.prompt_graphs import TOKENS, PromptGraphs

CLOSE = 1e-5  # kernels for another number of tokens add the same terms in another order
LENGTHS = (90, 1, 40)
MOST_TOKENS, MOST_REQUESTS = 100, 8  # of a step


def run_again(run):
    """In the place of a GPU's graph: what is in the same memory each time."""
    return run, run()


@pytest.fixture(scope="module")
def program(tiny_fp32) -> Program:
    program = load(tiny_fp32)
    program.prepare(MOST_TOKENS)
    return program


@pytest.fixture
def server(program, generator):
    """`server(steps, graphs)`: hidden states of each, as `graphs` or the program itself computes them; and caches."""
    ids = [torch.randint(0, program.vocab_size, (n,), dtype=torch.int32, generator=generator) for n in LENGTHS]

    def serve(steps, most_tokens=MOST_TOKENS, most_requests=MOST_REQUESTS, width=9, replayed=True):
        batch, begin, found = PagedBatch(program.plan.model, LENGTHS), [0] * len(LENGTHS), []
        graphs = None
        if replayed:
            given = most_tokens, most_requests, width, program.device, run_again
            graphs = PromptGraphs(lambda **step: program.forward(**step, kv=batch.kv), *given)
        for end in steps:
            step = batch.step(begin, end)
            step["input_ids"] = torch.cat([i[b:e] for i, b, e in zip(ids, begin, end, strict=True)])
            hidden_TD = program.forward(**step, kv=batch.kv) if graphs is None else graphs.forward(**step)
            found.append(None if hidden_TD is None else hidden_TD.clone())
            begin = end
        return found, batch.kv

    return serve


STEPS = [[40, 0, 0], [41, 0, 30], [88, 0, 31], [89, 1, 39], [90, 1, 40]]


def test_a_replayed_step_is_the_step(server):
    """Prompts in pieces, among requests that decode and such as have not begun, each in the place of a longer one."""
    expected, expected_kv = server(STEPS, replayed=False)
    found, kv = server(STEPS)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < CLOSE
    for ours, theirs in zip(kv, expected_kv, strict=True):
        assert ours.isnan().equal(theirs.isnan()), "what no token was cached in is as it was"
        assert relative_error(ours.nan_to_num(), theirs.nan_to_num()) < CLOSE


def test_a_narrow_table_of_blocks_is_noticed(server):
    """Negative control of the comparison above: blocks that lie beyond the table are not read, or others are."""
    expected, _ = server(STEPS, replayed=False)
    found, _ = server(STEPS, width=LENGTHS[0] // BLOCK_SIZE - 1)
    assert relative_error(found[2], expected[2]) > CLOSE


@pytest.mark.parametrize(("most_tokens", "most_requests"), [(39, 8), (100, 2)])
def test_none_has_room(server, most_tokens, most_requests):
    (found,), kv = server([[40, 0, 0]], most_tokens, most_requests)
    assert found is None
    assert all(cache.isnan().all() for cache in kv), "recording caches nothing"


def test_tokens_that_belong_to_no_request(program, generator):
    """An engine's own padding is no part of the requests that a graph has beyond the step's."""
    given = PagedBatch(program.plan.model, LENGTHS).step([0, 0, 0], [7, 1, 20])
    given["input_ids"] = torch.randint(0, program.vocab_size, (28,), dtype=torch.int32, generator=generator)
    padded = {
        name: torch.cat([tensor, tensor[:4] * 0 - int(name == "slot_mapping")]) if len(tensor) == 28 else tensor
        for name, tensor in given.items()
    }
    run = []
    graphs = PromptGraphs(
        lambda **step: run.append(step) or step["input_ids"], MOST_TOKENS, MOST_REQUESTS, 9, program.device, run_again
    )
    assert graphs.forward(**padded).shape == (32,)
    assert run[-1]["query_start_loc"].tolist() == [0, 7, 8, *[28] * (MOST_REQUESTS - 2)]


def test_what_a_larger_step_has_left(program):
    """Is no part of the next."""
    batch, run = PagedBatch(program.plan.model, LENGTHS), []
    graphs = PromptGraphs(
        lambda **step: run.append(step) or step["input_ids"], MOST_TOKENS, MOST_REQUESTS, 9, program.device, run_again
    )
    for live in (3, 1):
        step = batch.step([0, 0, 0][:live], [20, 1, 9][:live])
        step["input_ids"] = torch.zeros(len(step["positions"]), dtype=torch.int32)
        assert graphs.forward(**step | {"block_table": step["block_table"][:live]}) is not None
    assert run[-1]["seq_lens"].tolist() == [20, *[0] * (MOST_REQUESTS - 1)]
    assert run[-1]["query_start_loc"].tolist() == [0, *[20] * MOST_REQUESTS]
    assert (run[-1]["slot_mapping"] >= 0).sum() == 20


@pytest.mark.parametrize("most", [1, 2, 16, 100, 512])
def test_sizes(most):
    """Up to the longest step and no further, the largest first; none that the program would take for one of decode."""
    recorded = []

    def record(run):
        run()
        return run, torch.empty(0)

    graphs = PromptGraphs(lambda **step: recorded.append(step), most, 300, 4, torch.device("cpu"), record)
    sizes = [len(step["input_ids"]) for step in recorded]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes == [most, *(size for size in reversed(TOKENS) if size < most)][: most - 1]
    for step in recorded:
        assert len(step["seq_lens"]) == min(len(step["input_ids"]) - 1, 300)
        assert (step["slot_mapping"] == -1).all()
    for tokens in (1, *sizes, most + 1):
        step = {name: torch.zeros(tokens) for name in ("input_ids", "positions", "slot_mapping")}
        step |= {
            "block_table": torch.zeros(1, 4),
            "seq_lens": torch.ones(1),
            "query_start_loc": torch.tensor([0, tokens]),
        }
        replayed = graphs.forward(**step) is not None
        smallest = [size for size in sizes if size >= tokens][-1:]
        found = [len(recorded[-1]["input_ids"])] if replayed else []
        assert found == smallest, "the smallest that has room is replayed"
