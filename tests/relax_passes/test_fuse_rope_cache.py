"""Rotary embedding of q and k, and the write of k and v into the KV cache, become one operator."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from tests import models
from tests.conftest import SEED
from tests.relax_passes.harness import Served, own_operators
from vllm_compile.accuracy import relative_error
from vllm_compile.relax_passes.base import match_counts
from vllm_compile.relax_passes.fuse_rope_cache import fuse_rope_cache
from vllm_compile.relax_passes.merge_qkv import merge_qkv
from vllm_compile.relax_passes.outline_layers import outline_layers
from vllm_compile.relax_passes.page_kv_cache import page_kv_cache


def swapped_halves(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, -first), dim=-1)


def unsigned_halves(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


def uneven_halves(x):
    width = x.shape[-1]
    return torch.cat((-x[..., width // 4 :], x[..., : width // 4]), dim=-1)


def queries_alone(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + modeling_llama.rotate_half(q) * sin, k


def keys_backwards(q, k, cos, sin, unsqueeze_dim=1):
    """Keys turn with the cosines and sines exchanged."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    turn = modeling_llama.rotate_half
    return q * cos + turn(q) * sin, k * sin + turn(k) * cos


def apply(pair, generator):
    """The layer after the pass and its matches, after checking that the logits stay."""
    before = merge_qkv(outline_layers(page_kv_cache(pair.imported.module)))
    after = fuse_rope_cache(before)
    ids = torch.randint(0, 80, (23,), generator=generator, dtype=torch.int32)
    logits = [Served(module, pair).prompt(ids, chunk=9) for module in (before, after)]
    assert relative_error(logits[1], logits[0]) < 1e-6
    return own_operators(after["layer_0"]), match_counts(after)["fuse_rope_cache"]


@pytest.mark.parametrize("kind", ["two layers", "multi-head", "multi-query", "wide heads", "bfloat16"])
def test_one_operator(kind, pairs, generator):
    operators, matches = apply(pairs(kind), generator)
    assert matches == 1
    assert operators["qkv_rope_cache"] == operators["paged_attention"] == 1
    assert "kv_cache_write" not in operators


@pytest.mark.parametrize(
    ("function", "replacement"),
    [
        ("rotate_half", swapped_halves),
        ("rotate_half", unsigned_halves),
        ("rotate_half", uneven_halves),
        ("apply_rotary_pos_emb", queries_alone),
        ("apply_rotary_pos_emb", keys_backwards),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_near_misses(function, replacement, generator, monkeypatch):
    """What turns otherwise than half-split RoPE is left as it is."""
    monkeypatch.setattr(modeling_llama, function, replacement)
    operators, matches = apply(models.pair(SEED), generator)
    assert matches == 0
    assert operators["kv_cache_write"] == 1
