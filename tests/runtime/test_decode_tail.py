"""Logits and greedy tokens that a decode step's graph computes: whose they are, and for how long."""

import pytest
import torch

from vllm_compile.runtime.decode_tail import DecodeTail

LARGEST, VOCABULARY = 8, 64


class Program:
    """Its logits lie in the same memory each time, as a compiled program's do, and its tokens."""

    def __init__(self, generator: torch.Generator) -> None:
        self.memory = torch.full((LARGEST * VOCABULARY,), float("nan"))
        self.tokens = torch.full((LARGEST, 1), -1)
        self.weight_VD = torch.randn(VOCABULARY, 4, generator=generator)

    def logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        logits_RV = self.memory[: len(hidden_RD) * VOCABULARY].view(-1, VOCABULARY)
        return torch.mm(hidden_RD, self.weight_VD.T, out=logits_RV)

    def greedy(self, logits_RV: torch.Tensor) -> torch.Tensor:
        return torch.argmax(logits_RV, dim=-1, keepdim=True, out=self.tokens[: len(logits_RV)])


@pytest.fixture
def program(generator) -> Program:
    return Program(generator)


@pytest.fixture
def tail(program) -> DecodeTail:
    """Recorded as engines capture graphs, the largest first."""
    tail = DecodeTail(program.logits, program.greedy, LARGEST)
    for rows in (8, 4, 2, 1):
        tail.record(torch.zeros(rows, 4))
    return tail


@pytest.fixture(name="hidden_RD")
def hidden_states(generator) -> torch.Tensor:
    return torch.randn(4, 4, generator=generator)


def test_logits_and_tokens_of_a_padded_step(tail, program, hidden_RD):
    tail.begin(3)
    tail.record(hidden_RD)  # as a replay does, of 4 rows
    expected_RV = (hidden_RD @ program.weight_VD.T)[:3]
    assert torch.equal(tail.logits(3), expected_RV)
    assert torch.equal(tail.tokens(3), expected_RV.argmax(-1, keepdim=True))
    assert tail.tokens(3).dtype == torch.int64


def test_logits_are_those_of_one_question(tail, hidden_RD):
    """The next are of a prompt's hidden states, whose number may be the same; tokens are still those of the step."""
    tail.begin(4)
    tail.record(hidden_RD)
    assert tail.logits(4) is not None
    assert tail.logits(4) is None
    assert tail.tokens(4) is not None


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_none_of_another_number_of_rows(tail, hidden_RD, rows):
    tail.begin(4)
    tail.record(hidden_RD)
    assert tail.logits(rows) is None
    assert tail.tokens(rows) is None


@pytest.mark.parametrize("rows", [0, 9])
def test_none_of_steps_that_were_not_recorded(tail, hidden_RD, rows):
    tail.begin(4)
    tail.record(hidden_RD)
    tail.begin(rows)
    for asked in (rows, 4):
        assert tail.logits(asked) is None
        assert tail.tokens(asked) is None


def test_none_where_nothing_was_recorded(program):
    tail = DecodeTail(program.logits, program.greedy, LARGEST)
    tail.begin(1)
    assert tail.logits(1) is None
    assert tail.tokens(1) is None


def test_more_rows_than_requests_are_left_out(program):
    tail = DecodeTail(program.logits, program.greedy, 2)
    tail.record(torch.zeros(3, 4))
    assert program.memory.isnan().all()
    tail.begin(3)
    assert tail.logits(3) is None


def test_tokens_outlive_the_step(tail, hidden_RD):
    """They are copied to the host while the next step runs."""
    tail.begin(4)
    tail.record(hidden_RD)
    tokens_R = tail.tokens(4)
    kept_R = tokens_R.clone()
    tail.record(-hidden_RD)
    assert torch.equal(tokens_R, kept_R)
    assert not torch.equal(tail.tokens(4), kept_R)


def test_tokens_are_those_of_logits_before_anything_was_written_over_them(tail, program, hidden_RD):
    tail.begin(4)
    tail.record(hidden_RD)
    tail.logits(4).fill_(0)
    assert torch.equal(tail.tokens(4), (hidden_RD @ program.weight_VD.T).argmax(-1, keepdim=True))
