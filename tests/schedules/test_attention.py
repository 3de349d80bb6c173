"""Paged attention: against the reference, and what serving relies on beyond it.

A query's result does not change by one bit with the other requests of the batch, with the chunks a prompt
is cut into, or with whether it is decoded or prefilled; memory that a request does not own never reaches it.
"""

import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from vllm_compile.ops import PAGED_ATTENTION
from vllm_compile.schedules.cpu.attention import PagedAttention
from vllm_compile.spec import OpSpec

from .harness import assert_matches, compile_variants, op_spec, results, run
from .levels import HOST, TARGETS

FAMILY = PagedAttention()
# (queries, cached tokens): prefill, chunk after a prefix, decode, speculative decode, padding.
MIXED = ((70, 70), (33, 300), (1, 1), (1, 129), (3, 77), (0, 0), (5, 200), (2, 2))
SHAPE = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64}


@cache
def compiled(spec: OpSpec, target):
    """One kernel per shape (block size, lengths and strides are bound at each call), and its library."""
    folder = Path(mkdtemp())
    kernel = compile_variants(FAMILY, spec, target, folder)[1]
    return kernel, next(folder.glob("*.so"))


def attention_spec(inputs, attributes):
    return op_spec(PAGED_ATTENTION, {**inputs, "seq_lens": torch.zeros_like(inputs["seq_lens"])}, attributes)


def attend(inputs, attributes, target):
    spec = attention_spec(inputs, attributes)
    return run(compiled(spec, target)[0], FAMILY, spec, target, inputs)[0]


def sample(generator, dtype, lengths=MIXED, block_size=16, **shape):
    return PAGED_ATTENTION.sample(generator, dtype, lengths, block_size=block_size, **(SHAPE | shape))


def check(inputs, attributes, target):
    actual = attend(inputs, attributes, target)
    assert_matches(PAGED_ATTENTION, (actual,), results(PAGED_ATTENTION, inputs, attributes))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [7, 16, 48, 128])
def test_mixed_batch_matches(block_size, dtype, target, generator):
    check(*sample(generator, dtype, block_size=block_size), target)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype"),
    [
        (2, 2, 16, torch.bfloat16),
        (6, 2, 32, torch.float32),
        (7, 1, 80, torch.bfloat16),
        (20, 1, 96, torch.bfloat16),
        (4, 2, 128, torch.bfloat16),
        (3, 1, 256, torch.float32),
        (128, 1, 48, torch.bfloat16),
    ],
)
def test_head_shapes(num_heads, num_kv_heads, head_dim, dtype, generator):
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    check(*sample(generator, dtype, **shape), HOST)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared_values", [0, 64], ids=["values behind keys", "values within keys"])
def test_values_of_another_width(shared_values, dtype, target, generator):
    """As DeepSeek-V2 has them: keys of 96 columns, values of 64 behind them; or the first 64 of the keys'."""
    shape = {"num_heads": 8, "num_kv_heads": 1 if shared_values else 4, "head_dim": 96}
    inputs, attributes = sample(generator, dtype, **shape, columns=96 if shared_values else 160)
    if shared_values:
        attributes |= {"shared_values": shared_values}
    check(inputs, attributes, target)
    actual = attend(inputs, attributes, target)
    assert actual.shape[2] == 64
    # Negative control: values from the columns beside them.
    inputs["kv"] = inputs["kv"].roll(-1, -1)
    with pytest.raises(AssertionError):
        assert_matches(PAGED_ATTENTION, (actual,), results(PAGED_ATTENTION, inputs, attributes))


OPTIONS = [{"window": 40}, {"window": 7, "soft_cap": 2.0}, {"soft_cap": 2.0}, {"window": 1}]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_window_and_soft_cap(options, dtype, target, generator):
    """They match, they matter, and chunks change no bit."""
    inputs, attributes = sample(generator, dtype, lengths=((333, 333), (1, 90)), block_size=48)
    check(inputs, attributes | options, target)
    whole = attend(inputs, attributes | options, target)
    with pytest.raises(AssertionError):
        assert_matches(PAGED_ATTENTION, (whole,), results(PAGED_ATTENTION, inputs, attributes))
    for begin, end in [(64, 65), (332, 333), (30, 300), (100, 103)]:
        chunk = {
            **inputs,
            "q": inputs["q"][begin:end],
            "block_table": inputs["block_table"][:1],
            "seq_lens": torch.tensor([end], dtype=torch.int32),
            "query_start_loc": torch.tensor([0, end - begin], dtype=torch.int32),
        }
        assert torch.equal(attend(chunk, attributes | options, target), whole[begin:end]), (begin, end)


@pytest.mark.parametrize("target", TARGETS)
def test_float32_is_as_good_as_float32_can_be(target, generator):
    inputs, attributes = sample(generator, torch.float32, lengths=((1, 3001), (200, 1000)), block_size=128)
    double = {**inputs, "q": inputs["q"].double()}
    error = attend(inputs, attributes, target) - PAGED_ATTENTION.reference(**double, **attributes)
    # A score of 4 to 8 is known to 2^-22, and so is its share of a sum, in which the largest value is below 6.
    assert error.abs().max() < 6 * 2**-22


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_and_neighbours_change_no_bit(dtype, target, generator):
    inputs, attributes = sample(generator, dtype, lengths=((333, 333), (1, 90)), block_size=48)
    whole = attend(inputs, attributes, target)
    for begin, end in [(0, 1), (64, 65), (332, 333), (47, 50), (96, 100), (128, 133), (10, 27), (30, 300)]:
        count = end - begin
        chunk = {
            **inputs,
            "q": torch.cat([inputs["q"][333:], inputs["q"][begin:end]]),
            "block_table": inputs["block_table"].flip(0),
            "seq_lens": torch.tensor([90, end], dtype=torch.int32),
            "query_start_loc": torch.tensor([0, 1, 1 + count], dtype=torch.int32),
        }
        actual = attend(chunk, attributes, target)
        assert torch.equal(actual[1:], whole[begin:end]), (begin, end)
        assert torch.equal(actual[:1], whole[333:])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_foreign_memory_is_never_used(dtype, target, generator):
    """NaN in all slots that no request owns, table entries that point nowhere, padded requests and tokens."""
    inputs, attributes = sample(generator, dtype)
    expected = attend(inputs, attributes, target)
    owned = torch.zeros(inputs["kv"].shape[0], 16, dtype=torch.bool)
    table = inputs["block_table"].clone()
    for r, length in enumerate(inputs["seq_lens"].tolist()):
        for position in range(length):
            owned[table[r, position // 16], position % 16] = True
        table[r, -(-length // 16) :] = 2**30
    padded = {
        "q": torch.cat([inputs["q"], torch.full((9, *inputs["q"].shape[1:]), float("nan"), dtype=dtype)]),
        "kv": inputs["kv"].masked_fill(~owned[:, None, :, None], float("nan")),
        "block_table": torch.cat([table, torch.full((3, table.shape[1]), 2**30, dtype=torch.int32)]),
        "seq_lens": torch.cat([inputs["seq_lens"], torch.zeros(3, dtype=torch.int32)]),
        "query_start_loc": torch.cat([inputs["query_start_loc"], inputs["query_start_loc"][-1:].expand(3)]),
    }
    actual = attend(padded, attributes, target)
    tokens = expected.shape[0]
    assert torch.equal(actual[:tokens], expected)
    assert actual[tokens:].isnan().all(), "rows of no request are left as they were"


def test_strides_and_misaligned_metadata(generator):
    """Token-major blocks inside a larger cache; metadata that starts in the middle of a tensor."""
    inputs, attributes = sample(generator, torch.bfloat16)
    expected = attend(inputs, attributes, HOST)
    B, KH, N, C = inputs["kv"].shape
    kv = torch.full((B, 2, N, KH, C), float("nan"), dtype=torch.bfloat16)[:, 1].transpose(1, 2).copy_(inputs["kv"])
    odd = {
        name: torch.cat([inputs[name].flatten()[:1], inputs[name].flatten()])[1:].view_as(inputs[name])
        for name in ("q", "block_table", "seq_lens", "query_start_loc")
    }
    assert not kv.is_contiguous()
    assert torch.equal(attend({**inputs, **odd, "kv": kv}, attributes, HOST), expected)


def test_runs_on_openmp_in_a_process_without_tvm(generator, tmp_path):
    """With TVM imported, as in these tests, its runtime would supply what a kernel should not need."""
    inputs, attributes = sample(generator, torch.bfloat16)
    torch.save([*inputs.values(), attend(inputs, attributes, HOST)], tmp_path / "tensors")
    script = (
        "import sys, torch, tvm_ffi\n"
        "*inputs, expected = torch.load(sys.argv[2])\n"
        "out = torch.empty_like(expected)\n"
        "tvm_ffi.load_module(sys.argv[1])['k1'](*inputs, out)\n"
        "assert torch.equal(out, expected) and 'tvm' not in sys.modules\n"
    )
    _, library = compiled(attention_spec(inputs, attributes), HOST)
    subprocess.run([sys.executable, "-c", script, str(library), str(tmp_path / "tensors")], check=True)


def test_no_request_and_no_token(generator):
    inputs, attributes = sample(generator, torch.float32, lengths=((0, 0), (0, 0)))
    assert attend(inputs, attributes, HOST).shape[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("broken", ["mask", "block table"])
def test_comparison_sees_what_is_broken(broken, dtype, generator):
    inputs, attributes = sample(generator, dtype)
    wrong = dict(inputs)
    if broken == "mask":  # every query sees one token too many
        wrong["seq_lens"] = inputs["seq_lens"] + (inputs["seq_lens"] > 0).int()
    else:
        wrong["block_table"] = inputs["block_table"].roll(1, 0)
    actual = attend(wrong, attributes, HOST)
    with pytest.raises(AssertionError):
        assert_matches(PAGED_ATTENTION, (actual,), results(PAGED_ATTENTION, inputs, attributes))
