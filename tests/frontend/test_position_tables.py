"""Position tables hold the cosines and sines that Hugging Face computes, to the last bit."""

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.models import KINDS, MAX_POSITIONS, config, pair
from vllm_compile.frontend.families import max_positions
from vllm_compile.frontend.hf import trace
from vllm_compile.frontend.importer import import_model

SCALED = KINDS["llama3 rope"]
ROPES = {
    "default": {},
    "large theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3": SCALED,
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
}
# For 256K positions, as they are published: Llama 3.1's, Qwen's, Phi's (made up factors), InternLM's.
LONG = 1 << 18
LONG_ROPES = {
    "llama3": {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 8.0},
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 8.0},
    "longrope": {"short_factor": [1.0, 1.02, 1.3, 1.5, 2.0, 2.3], "long_factor": [2.0, 3.0, 7.0, 19.0, 40.0, 63.0]},
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


def long_config(kind):
    """Of 256K positions, trained for 8K; with longrope, whose short factors serve that alone, for half of them."""
    trained = LONG // 2 if kind == "longrope" else 8192
    rope = {"rope_type": kind, "rope_theta": 5e5, "original_max_position_embeddings": trained, **LONG_ROPES[kind]}
    return config(num_hidden_layers=1, max_position_embeddings=LONG, rope_parameters=rope)


@pytest.mark.parametrize("kind", LONG_ROPES)
def test_long_contexts_in_float64(kind):
    """At 128K and 256K positions, from Hugging Face's frequencies; dynamic RoPE's are those of a short sequence.

    An angle is a float32 product of position and frequency, so it is off by up to 2**-24 of itself.
    """
    long = long_config(kind)
    served = max_positions(long)
    assert served == (LONG // 2 if kind == "longrope" else LONG)
    tables = list(import_model(trace(long, torch.float32), served).tables.values())
    parts = [(0, served, None)]
    if kind == "longrope":
        parts.append((served, LONG, LONG))
    for first, count, length in parts:
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](long, torch.device("cpu"), length)
        positions = torch.cat([torch.arange(at - 64, at) for at in (64, LONG // 2, count)])
        angles = torch.outer(positions.double(), frequencies.double()).repeat(1, 2)
        bound = scaling * (angles * 2**-24 + 2**-22)
        for table, function in zip(tables, (torch.cos, torch.sin), strict=True):
            rows = table[first:]
            assert table.shape == (sum(size for _, size, _ in parts), 12)
            assert ((rows[positions] - function(angles) * scaling).abs() <= bound).all()
            # Negative control: neither the next position nor another scaling is within the bound.
            assert ((rows[positions - 1] - function(angles) * scaling).abs() > bound).any(dim=1).all()
            assert ((rows[positions] - function(angles * 1.001) * scaling).abs() > bound)[1:].any(dim=1).all()


def test_a_position_off_by_one_is_noticed(pairs):
    """Negative control: the rows differ from their neighbours."""
    for table in pairs("two layers").imported.tables.values():
        assert (table[1:] != table[:-1]).any(dim=1).all()


def test_scaling_shows_in_the_tables(pairs):
    plain, scaled = (list(pairs(kind).imported.tables.values()) for kind in ("two layers", "llama3 rope"))
    assert not plain[0].equal(scaled[0])
