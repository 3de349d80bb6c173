"""RoPE and the write of the paged cache: results, untouched slots, strides, padding, failing controls."""

import pytest
import torch

from vllm_compile.ops import QKV_ROPE_CACHE
from vllm_compile.schedules.cpu.rope_cache import QKVRopeCache

from .harness import assert_matches, compile_variants, op_spec, results, run
from .levels import HOST, TARGETS

FAMILY = QKVRopeCache()


def both(kernel, spec, target, inputs, attributes):
    """(q, kv) of the kernel, (q, kv) of the reference, each from its own copy of the cache."""
    ours, theirs = ({**inputs, "kv": inputs["kv"].clone()} for _ in range(2))
    (q,) = run(kernel, FAMILY, spec, target, ours)
    (expected,) = results(QKV_ROPE_CACHE, theirs, attributes)
    return (q, ours["kv"]), (expected, theirs["kv"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"), [(8, 2, 64, 16), (3, 3, 80, 7), (6, 1, 128, 128)]
)
def test_every_variant_matches(num_heads, num_kv_heads, head_dim, block_size, dtype, target, generator, tmp_path):
    inputs, attributes = QKV_ROPE_CACHE.sample(generator, dtype, 33, num_heads, num_kv_heads, head_dim, block_size)
    spec = op_spec(QKV_ROPE_CACHE, inputs, attributes)
    kernels = compile_variants(FAMILY, spec, target, tmp_path)
    for kernel in kernels.values():
        actual, expected = both(kernel, spec, target, inputs, attributes)
        assert_matches(QKV_ROPE_CACHE, actual, expected)
        if dtype == torch.bfloat16:
            assert torch.equal(actual[0], expected[0])
    one = {name: tensor if name == "kv" else tensor[3:4] for name, tensor in inputs.items()}
    alone = [both(kernel, spec, target, one, attributes)[0][0][0] for kernel in kernels.values()]
    assert all(torch.equal(q, actual[0][3]) for q in alone)


@pytest.mark.parametrize("token_major", [False, True])
def test_cache_with_any_outer_strides(token_major, generator, tmp_path):
    target = HOST
    inputs, attributes = QKV_ROPE_CACHE.sample(generator, torch.bfloat16)
    spec = op_spec(QKV_ROPE_CACHE, inputs, attributes)
    kernel = compile_variants(FAMILY, spec, target, tmp_path)[1]
    kv = inputs["kv"]
    if token_major:
        strided = kv.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        strided = torch.zeros(kv.shape[0] * 2, *kv.shape[1:], dtype=kv.dtype)[1::2].copy_(kv)
    assert not strided.is_contiguous()
    expected = {**inputs, "kv": kv.clone()}
    (q,) = results(QKV_ROPE_CACHE, expected, attributes)
    actual = run(kernel, FAMILY, spec, target, {**inputs, "kv": strided})
    assert_matches(QKV_ROPE_CACHE, (*actual, strided), (q, expected["kv"]))


@pytest.mark.parametrize("broken", ["position", "slot"])
def test_comparison_sees_an_error_of_one(broken, generator, tmp_path):
    target = HOST
    inputs, attributes = QKV_ROPE_CACHE.sample(generator, torch.float32)
    spec = op_spec(QKV_ROPE_CACHE, inputs, attributes)
    kernel = compile_variants(FAMILY, spec, target, tmp_path)[1]
    if broken == "position":
        wrong = {**inputs, "cos": inputs["cos"].roll(1, 0), "sin": inputs["sin"].roll(1, 0)}
    else:
        wrong = {**inputs, "slot_mapping": (inputs["slot_mapping"] + 1).clamp(max=47)}
    (q, kv), _ = both(kernel, spec, target, wrong, attributes)
    _, expected = both(kernel, spec, target, inputs, attributes)
    with pytest.raises(AssertionError):
        assert_matches(QKV_ROPE_CACHE, (q, kv), expected)
