"""Steps that repeat the requests of the step before, beside the inputs that vLLM prepares for each anew."""

from __future__ import annotations

import random
from copy import copy
from dataclasses import fields, make_dataclass
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from tests.conftest import SEED
from tests.runtime import random_steps
from tests.runtime.random_steps import LENGTH, Server, assert_equal, configuration, vllms_runner
from vllm_compile.runtime import vllm_runner
from vllm_compile.runtime.vllm_runner import ABSENT, OTHERS, SAME, CompiledRunner, may_be_repeated, repeat_steps


@pytest.fixture
def runner(monkeypatch):
    """`runner()`: vLLM's, with kernels that need no GPU."""
    for name in ("prepare_prefill_inputs", "prepare_pos_seq_lens", "combine_sampled_and_draft_tokens"):
        monkeypatch.setattr(model_runner, name, getattr(random_steps, name))
    monkeypatch.setattr(vllm_runner, "advance_step", random_steps.advance_step)
    return vllms_runner


@pytest.fixture
def anew(monkeypatch) -> list[GPUModelRunner]:
    """The runner of each step that vLLM prepares."""
    prepared, prepare = [], GPUModelRunner.prepare_inputs

    def prepare_inputs(self, *given, **named):
        prepared.append(self)
        return prepare(self, *given, **named)

    monkeypatch.setattr(GPUModelRunner, "prepare_inputs", prepare_inputs)
    return prepared


@pytest.fixture
def pair(runner):
    """A server, vLLM's runner, and the one that repeats steps."""
    theirs, ours = runner(), runner()
    repeat_steps(ours)
    assert type(ours) is CompiledRunner
    return Server(random.Random(SEED), theirs, ours), theirs, ours


def serve(server: Server, steps: int = 300) -> int:
    """Compares steps that requests join and leave at random, with prompts in pieces; how many there were."""
    compared, rng = 0, server.rng
    for n in range(steps):
        # At most six of the eight places, so that graphs have rows to spare.
        come = rng.randrange(1, 3) if rng.random() < 0.05 and len(server.tokens) < 5 else 0
        long = any(computed > LENGTH - 14 for _, computed in server.tokens.values())
        go = len(server.tokens) if long else int(rng.random() < 0.05)
        odds = {"back": rng.random() < 0.7, "wait": n % 50 < 10 and rng.random() < 0.7}
        if step := server.step(come, go, chunk=rng.choice([1, 12]), **odds):
            assert_equal(step[1], step[0])
            compared += 1
    return compared


def test_inputs_are_vllms(pair, anew):
    server, theirs, ours = pair
    steps = serve(server)
    assert anew.count(theirs) == steps
    assert steps / 8 < anew.count(ours) < steps * 7 / 8, "some steps were repeated, some were not"
    assert ours.block_tables.gathered == anew.count(ours), "a repeated step has its blocks from the step before"
    for batch, then in server.batches:  # steps in flight are not changed by those after them
        assert all(then[name] is value for name, value in vars(batch).items())


def same_names(last, scheduler_output, *_):
    return scheduler_output.num_scheduled_tokens == last.tokens


def same_count(last, scheduler_output, *_):
    return len(scheduler_output.num_scheduled_tokens) == len(last.tokens) and not scheduler_output.scheduled_new_reqs


def all_but(index: int):
    """The step's inputs but for one, by its place among the arguments."""

    def advance_step(*given):
        random_steps.advance_step(*(part.clone() if i == index else part for i, part in enumerate(given)))

    return advance_step


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("repeats", same_names),
        ("repeats", same_count),
        *(("advance_step", all_but(index)) for index in range(5, 10)),
    ],
    ids=["a name used again", "other requests", "tokens", "positions", "lengths", "blocks", "slots"],
)
def test_a_difference_is_noticed(pair, monkeypatch, name, broken):
    monkeypatch.setattr(vllm_runner, name, broken, raising=False)
    with pytest.raises(AssertionError):
        serve(pair[0], 2000)


@pytest.fixture
def decoding(pair, anew):
    """A server of three requests whose last step was repeated."""
    server, _, ours = pair
    server.step(come=3)
    while ours in anew:
        anew.clear()
        server.step()
    return server, ours


def roll_back(server: Server, runner: GPUModelRunner) -> None:
    """A request's last prompt token is computed once more."""
    name = min(server.tokens)
    length, _ = server.tokens[name]
    server.tokens[name] = length, length - 1
    for each in server.runners:
        states = each.req_states
        states.num_computed_tokens.gpu[states.req_id_to_index[name]] = length - 1


@pytest.mark.parametrize(
    "between",
    [
        lambda server, runner: runner._dummy_run(4),
        lambda server, runner: repeat_steps(runner),
        lambda server, runner: runner.capture_model(),
        lambda server, runner: runner.initialize_kv_cache("a configuration"),
        lambda server, runner: server.leave(min(server.tokens)),
        lambda server, runner: vars(server).update(resumed={min(server.tokens)}),
        roll_back,
        lambda server, runner: vars(server).update(mode=CUDAGraphMode.PIECEWISE),
    ],
    ids=[
        "a dummy run",
        "a cache that was discarded",
        "a capture",
        "another cache",
        "a request that left",
        "a request that came back",
        "a token that is computed again",
        "another graph",
    ],
)
def test_is_prepared_anew_behind(decoding, anew, monkeypatch, between):
    for name in ("_dummy_run", "capture_model", "initialize_kv_cache"):
        monkeypatch.setattr(GPUModelRunner, name, lambda self, *_: self.input_buffers.query_start_loc.fill_(0))
    server, ours = decoding
    between(server, ours)
    theirs, again = server.step()
    assert ours in anew
    assert_equal(again, theirs)


@pytest.mark.parametrize(
    "changed",
    [{"num_tokens": 9}, {"is_prefilling_np": np.array([True])}, *({name: 0} for name in sorted(ABSENT))],
    ids=str,
)
def test_what_may_be_repeated(decoding, changed):
    _, ours = decoding
    batch, graph = copy(ours._last.batch), ours._last.graph
    assert may_be_repeated(batch, graph)
    vars(batch).update(changed)
    assert not may_be_repeated(batch, graph)


def test_no_request_waits_for_a_compiler(decoding, monkeypatch):
    """A kernel is compiled when it is launched for the first time: once graphs are captured, which no request sees."""
    server, ours = decoding
    calls: list[object] = []
    monkeypatch.setattr(GPUModelRunner, "capture_model", lambda self: calls.append("graphs"))
    monkeypatch.setattr(vllm_runner, "advance_step", lambda *given: calls.append([part.dtype for part in given]))
    server.step()
    (as_served,) = calls
    ours.capture_model()
    assert calls[1:] == ["graphs", as_served]


def test_another_batch_gets_blocks_of_its_own(decoding):
    _, ours = decoding
    gathered = ours.block_tables.gathered
    ours.prepare_attn(copy(ours._last.batch))
    assert ours.block_tables.gathered == gathered + 1


def with_two_caches(runner: GPUModelRunner) -> None:
    (table,), slots = runner._last.attention
    runner._last.attention = (table, table), slots


def without_attention(runner: GPUModelRunner) -> None:
    runner._last.attention = None


@pytest.mark.parametrize("changed", [with_two_caches, without_attention])
def test_what_the_kernel_does_not_know_is_prepared_anew(decoding, anew, changed):
    server, ours = decoding
    anew.clear()
    changed(ours)
    assert_equal(*server.step())
    assert ours in anew


def test_a_graph_that_is_said_in_another_way(decoding, anew, monkeypatch):
    monkeypatch.setattr(vllm_runner, "BatchExecutionDescriptor", type("Another", (), {}))
    server, ours = decoding
    for _ in range(2):
        anew.clear()
        assert_equal(*server.step())
        assert ours in anew


def test_without_a_graph_it_is_vllms(pair, anew):
    server, _, ours = pair
    server.mode = CUDAGraphMode.NONE
    server.step(come=3)
    for _ in range(4):
        anew.clear()
        assert_equal(*server.step())
        assert ours in anew


class TestWhatIsNotKnown:
    """A runner that stays vLLM's, and says why."""

    @pytest.fixture
    def said(self, monkeypatch) -> list[str]:
        said: list[str] = []
        monkeypatch.setattr(vllm_runner.logger, "info", lambda text, *values: said.append(text % values))
        return said

    @pytest.mark.parametrize(
        ("given", "why"), [({"ranks": 2}, "several ranks"), ({"speculative": "a drafter"}, "speculation")], ids=str
    )
    def test_others_have_a_part(self, runner, said, given, why):
        made = runner()
        made.vllm_config = configuration(**given)
        repeat_steps(made)
        assert type(made) is GPUModelRunner
        assert said == [f"Each step's inputs are prepared anew: {why}"]

    def test_inputs_of_a_later_version(self, runner, said, monkeypatch):
        made, more = runner(), make_dataclass("InputBatch", [("of_the_future", int, 0)], bases=(InputBatch,))
        monkeypatch.setattr(vllm_runner, "InputBatch", more)
        repeat_steps(made)
        assert type(made) is GPUModelRunner
        assert said == ["Each step's inputs are prepared anew: a vLLM whose steps have of_the_future"]

    def test_another_runner(self, said):
        first = SimpleNamespace(vllm_config=configuration())
        repeat_steps(first)
        assert vars(first).keys() == {"vllm_config"}
        assert said == []


def test_every_field_is_of_one_kind():
    assert {field.name for field in fields(InputBatch)} <= SAME | OTHERS | ABSENT
    assert len(SAME) + len(OTHERS) + len(ABSENT) == len(SAME | OTHERS | ABSENT)
