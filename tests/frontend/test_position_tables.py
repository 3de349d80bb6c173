"""Position tables hold the cosines and sines that Hugging Face computes, to the last bit."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.models import KINDS, MAX_POSITIONS, config, pair

SCALED = KINDS["llama3 rope"]
ROPES = {
    "default": {},
    "large theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3": SCALED,
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rope", ROPES)
def test_bit_for_bit(rope, dtype):
    options = {**ROPES[rope], "dtype": dtype, "num_hidden_layers": 1}
    tables = list(pair(0, **options).imported.tables.values())
    embedding = LlamaRotaryEmbedding(config(**options))
    values = torch.zeros(1, dtype=getattr(torch, dtype))
    expected = embedding(values, torch.arange(MAX_POSITIONS)[None])
    assert len(tables) == 2
    for table, value in zip(tables, expected, strict=True):
        assert table.dtype == value.dtype
        assert table.equal(value[0])


def test_a_position_off_by_one_is_noticed(pairs):
    """Negative control: the rows differ from their neighbours."""
    for table in pairs("two layers").imported.tables.values():
        assert (table[1:] != table[:-1]).any(dim=1).all()


def test_scaling_shows_in_the_tables(pairs):
    plain, scaled = (list(pairs(kind).imported.tables.values()) for kind in ("two layers", "llama3 rope"))
    assert not plain[0].equal(scaled[0])
