"""Attention over the whole batch becomes attention over a paged KV cache."""

import pytest
import torch

from tests import interpreter
from tests.relax_passes.harness import Served, own_operators
from vllm_compile.accuracy import relative_error
from vllm_compile.relax_passes.base import match_counts
from vllm_compile.relax_passes.page_kv_cache import page_kv_cache


@pytest.fixture
def ids(generator) -> torch.Tensor:
    return torch.randint(0, 80, (37,), generator=generator, dtype=torch.int32)


def test_every_layer_gets_a_cache(pairs):
    pair = pairs("five layers")
    after = page_kv_cache(pair.imported.module)
    assert match_counts(after) == {"page_kv_cache": 5}
    operators = own_operators(after["main"])
    assert operators["kv_cache_write"] == operators["paged_attention"] == 5
    assert "causal_attention" not in operators
    names = [p.name for p in after["main"].params]
    caches = [f"kv_{layer}" for layer in range(5)]
    metadata = ["block_table", "seq_lens", "query_start_loc", "slot_mapping"]
    assert names[:11] == ["input_ids", "positions", *caches, *metadata]
    assert names[11:] == [p.name for p in pair.imported.module["main"].params[2:]]


@pytest.mark.parametrize("chunk", [None, 5, 1], ids=["whole", "chunks", "token by token"])
@pytest.mark.parametrize("kind", ["two layers", "multi-head", "multi-query"])
def test_same_logits(kind, chunk, ids, pairs):
    """Over the cache, attention sums the same terms in another order."""
    pair = pairs(kind)
    expected = interpreter.run(pair.imported.module, "main", *pair.arguments(ids))[0]
    served = Served(page_kv_cache(pair.imported.module), pair)
    assert relative_error(served.prompt(ids, chunk), expected) < 1e-5


def test_requests_do_not_see_each_other(ids, pairs):
    pair = pairs("two layers")
    served = Served(page_kv_cache(pair.imported.module), pair)
    batch = served.batch([len(ids), 9])
    together = served.logits(torch.cat([ids, ids[:9]]), batch, batch.step([0, 0], [len(ids), 9]))
    alone = torch.cat([served.prompt(ids), served.prompt(ids[:9])])
    assert relative_error(together, alone) < 1e-5
