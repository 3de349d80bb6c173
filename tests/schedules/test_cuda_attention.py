"""CUDA's attention as machine code, without a GPU: what windows and soft caps cost, and that others do not pay."""

import re
import shutil
from itertools import pairwise

import pytest
import torch

from vllm_compile import ops
from vllm_compile.errors import UnsupportedError
from vllm_compile.schedules.cuda.attention import default_variants
from vllm_compile.schedules.cuda.build import build_library, source
from vllm_compile.schedules.select import choose
from vllm_compile.targets import cuda

from . import harness
from .sass import loads_before_waiting, sass_of

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
TARGET = cuda.for_chip()
HEADS = (32, 8, 128)  # of Llama 3.1 8B and Mistral 7B
BOTH = {"window": 4096, "soft_cap": 50.0}
CALLS = {  # operator, heads, options
    "rope": (ops.QKV_ROPE_ATTENTION, HEADS, {}),
    "rope_both": (ops.QKV_ROPE_ATTENTION, HEADS, BOTH),
    "rope_64": (ops.QKV_ROPE_ATTENTION, (32, 8, 64), {}),  # of Llama 3.2 1B
    "rope_gemma2": (ops.QKV_ROPE_ATTENTION, (8, 4, 256), BOTH),
    "paged": (ops.PAGED_ATTENTION, HEADS, {}),
    "paged_both": (ops.PAGED_ATTENTION, HEADS, BOTH),
    "paged_256": (ops.PAGED_ATTENTION, (8, 4, 256), {}),
    "prompts_both": (ops.PAGED_ATTENTION, HEADS, BOTH | {"prompts": 1}),
    "prompts_128": (ops.PAGED_ATTENTION, HEADS, {"window": 4096, "prompts": 1}),
    "prompts_96": (ops.PAGED_ATTENTION, (32, 32, 96), {"window": 2047, "prompts": 1}),  # of Phi 3 mini
    "prompts_64": (ops.PAGED_ATTENTION, (32, 8, 64), {"window": 512, "prompts": 1}),
    "prompts_gemma2": (ops.PAGED_ATTENTION, (8, 4, 256), BOTH | {"prompts": 1}),
}
MANY = ("rope", "rope_64", "rope_both", "paged_256")  # of which the kernel for most requests is built, too


def kernels_of(op, heads, options):
    """Kernels, for few requests first."""
    inputs, attributes = op.sample(torch.Generator(), torch.bfloat16, ((1, 1),), *heads)
    spec = harness.op_spec(op, inputs, attributes | options)
    choice = choose(spec, TARGET)
    return [choice.family.build(spec, variant.config, TARGET) for variant in choice.variants]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(library, resources by symbol) of the kernels for few requests, and some for many."""
    kernels = {name: kernels_of(*call)[0] for name, call in CALLS.items()}
    kernels |= {f"{name}_many": kernels_of(*CALLS[name])[-1] for name in MANY}
    path = tmp_path_factory.mktemp("cuda") / "kernels.so"
    return path, build_library(kernels, TARGET, path)


def test_blocks_share_the_memory_of_a_multiprocessor():
    """228 KB, of which each block costs one besides its own (CUDA C++ Programming Guide, compute capability 9.0)."""
    assert [TARGET.shared_bytes_of(blocks) >> 10 for blocks in (1, 2, 3, 4)] == [227, 113, 75, 56]


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 132, 133, 300])
@pytest.mark.parametrize("head_dim", range(32, 257, 32))
def test_kernels_for_more_and_more_requests(head_dim, kv_heads):
    """More, smaller blocks the more requests there are; stages, and a group's turned heads, fit beside each other."""
    for group in (1, 8, 16):
        inputs, attributes = ops.PAGED_ATTENTION.sample(
            torch.Generator(), torch.bfloat16, ((1, 1),), group * kv_heads, kv_heads, head_dim
        )
        variants = default_variants(harness.op_spec(ops.PAGED_ATTENTION, inputs, attributes), TARGET)
        assert variants[0].min_tokens == 1
        for before, after in pairwise(variants):
            blocks = before.config["blocks"]
            served = blocks * TARGET.multiprocessors // kv_heads
            assert after.min_tokens == served + 1
            assert after.config["blocks"] > blocks
        for variant in variants:
            blocks, warps, stages = (variant.config[name] for name in ("blocks", "warps", "stages"))
            used = warps * stages * 16 * 4 * head_dim + (group + 2) * (2 * head_dim + 16)
            assert 2 <= stages <= 6
            assert blocks * (used + 1024) <= 228 << 10


def test_nothing_is_spilled(built):
    assert len(built[1]) == len(CALLS) + len(MANY)
    for symbol, used in built[1].items():
        assert used.spilled_bytes == 0, symbol


def test_machine_code(built):
    code = sass_of(built[0])
    assert code.keys() == built[1].keys()
    for symbol, text in code.items():
        for instruction in ("HMMA.16816.F32.BF16", "LDGSTS.E.BYPASS", "LDSM.16.M88.4", "LDSM.16.MT88.4", "PREEXIT"):
            assert instruction in text, f"{symbol} has no {instruction}"
        # The program's arguments: of each request where its tokens and cached ones end, four requests at a time, where
        # they are shared out, found, and looked through for those that share a block.
        early = loads_before_waiting(text)
        assert len(early) <= 40, (symbol, early)
        assert set(early) <= {"LDG.E"}, (symbol, early)
        # The cache is copied 16 bytes at a time.
        assert not re.search(r"LDGSTS(?!\.E\.BYPASS\S*\.128)", text), symbol
        assert not re.search(r"\b(LDL|STL)\b", text), f"{symbol} uses local memory"
    # A cap is one exponential and one division for each of the 4 scores that a lane has of a tile.
    for name in ("rope", "paged"):
        special = [len(re.findall("MUFU", code[symbol])) for symbol in (name, f"{name}_both")]
        assert special[1] - special[0] == 8, (name, special)


def test_models_without_windows_and_caps_have_the_kernels_they_had():
    """What is seen whole and not capped is no part of a call's source: templates have it by default."""
    few = {name: kernels_of(*CALLS[name])[0] for name in ("rope", "rope_both")}
    text = source(few, TARGET)
    assert text.count("rope_attention<128, 4, 8, 8, 3, 16>(") == 1
    assert text.count("rope_attention<128, 4, 8, 8, 3, 16, 4096, 1112014848>(") == 1  # the bits of 50


def test_other_options_are_refused(generator):
    inputs, attributes = ops.PAGED_ATTENTION.sample(generator, torch.bfloat16, ((1, 5),), 2, 1, 64, 16, 64)
    spec = harness.op_spec(ops.PAGED_ATTENTION, inputs, attributes | {"shared_values": 32})
    with pytest.raises(UnsupportedError, match="shared_values=32"):
        choose(spec, TARGET)


@pytest.mark.parametrize("scale", [-0.125, 0.0])
def test_prompts_are_scaled_by_more_than_zero(scale, generator):
    """Their scores are compared first."""
    inputs, attributes = ops.PAGED_ATTENTION.sample(generator, torch.bfloat16, ((1, 5),), 2, 1, 64)
    choose(harness.op_spec(ops.PAGED_ATTENTION, inputs, attributes | {"prompts": 1}), TARGET)
    with pytest.raises(UnsupportedError):
        choose(harness.op_spec(ops.PAGED_ATTENTION, inputs, attributes | {"prompts": 1, "scale": scale}), TARGET)
