"""Rotation, cache write and attention become one operator."""

import pytest
import torch

from tests.relax_passes.harness import Served, own_operators
from vllm_compile.accuracy import relative_error
from vllm_compile.relax_passes.base import match_counts
from vllm_compile.relax_passes.fuse_rope_attention import fuse_rope_attention
from vllm_compile.relax_passes.pipeline import passes_for


def before(pair):
    module = pair.imported.module
    for transform in passes_for():
        module = transform(module)
        if transform.info.name == "fuse_rope_cache":
            return module
    raise AssertionError("no such pass")


@pytest.mark.parametrize("kind", ["two layers", "multi-query", "bfloat16"])
def test_one_operator(kind, pairs, generator):
    module = before(pairs(kind))
    after = fuse_rope_attention(module)
    ids = torch.randint(0, 80, (23,), generator=generator, dtype=torch.int32)
    logits = [Served(m, pairs(kind)).prompt(ids, chunk=9) for m in (module, after)]
    assert relative_error(logits[1], logits[0]) < 1e-6
    assert match_counts(after)["fuse_rope_attention"] == 1
    operators = own_operators(after["layer_0"])
    assert operators["qkv_rope_attention"] == 1
    assert not {"qkv_rope_cache", "paged_attention"} & set(operators)


def test_only_where_it_is_served():
    names = [[p.info.name for p in passes_for(operators)] for operators in ((), {"qkv_rope_attention"})]
    assert "fuse_rope_attention" not in names[0]
    assert set(names[1]) - set(names[0]) == {"fuse_rope_attention"}
