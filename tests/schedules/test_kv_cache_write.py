"""The write of the paged cache on its own: results, untouched slots, padding, a failing control."""

import pytest
import torch

from vllm_compile.ops import KV_CACHE_WRITE
from vllm_compile.schedules.cpu.kv_cache_write import KVCacheWrite
from vllm_compile.spec import OpSpec

from .harness import compile_variants, results, tensor_spec
from .levels import HOST, TARGETS

FAMILY = KVCacheWrite()


def spec_of(inputs) -> OpSpec:
    named = tuple((name, tensor_spec(name, t)) for name, t in inputs.items())
    return OpSpec("kv_cache_write", named, ())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_kv_heads", "head_dim", "value_dim", "block_size"),
    [(2, 64, 64, 16), (3, 20, 20, 7), (2, 48, 32, 16), (1, 48, 0, 16)],
)
def test_every_variant_matches(num_kv_heads, head_dim, value_dim, block_size, dtype, target, generator, tmp_path):
    """Values of another width than keys too, and keys that hold the values."""
    inputs, _ = KV_CACHE_WRITE.sample(generator, dtype, 19, num_kv_heads, head_dim, block_size, value_dim)
    expected = results(KV_CACHE_WRITE, {**inputs, "kv": inputs["kv"].clone()}, {})[0]
    for kernel in compile_variants(FAMILY, spec_of(inputs), target, tmp_path).values():
        kv = inputs["kv"].clone()
        kernel(*(inputs | {"kv": kv}).values())
        assert torch.equal(kv, expected)


def test_comparison_sees_a_wrong_slot(generator, tmp_path):
    inputs, _ = KV_CACHE_WRITE.sample(generator, torch.float32)
    kernel = compile_variants(FAMILY, spec_of(inputs), HOST, tmp_path)[1]
    kv = inputs["kv"].clone()
    kernel(inputs["k"], inputs["v"], kv, (inputs["slot_mapping"] + 1).clamp(max=47))
    assert not torch.equal(kv, results(KV_CACHE_WRITE, inputs, {})[0])
