"""What FlashAttention is asked for, with a stand-in that does what its documentation says of these arguments.

tests/schedules/cuda_flash_cases.py has FlashAttention itself do it, on a GPU machine: here that comparison is tested.
"""

import re
import subprocess
import sys
from itertools import product

import pytest
import torch

from tests.conftest import SEED
from tests.schedules import cuda_flash_cases, harness
from vllm_compile import ops
from vllm_compile.runtime import vendor

REQUESTS = ((5, 30), (9, 9), (1, 37))


def flash_attention(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, block_table, softmax_scale, causal,
    softcap, fa_version,
):  # fmt: skip
    """Query i of a request sees the positions up to i + length - queries.

    Rounded as on a GPU: probabilities to bf16 before they weigh values, hyperbolic tangents to 11 bits.
    """
    assert causal
    assert fa_version == 3
    for r, length in enumerate(seqused_k.tolist()):
        begin, end = cu_seqlens_q[r : r + 2].tolist()
        assert length <= max_seqlen_k
        assert end - begin <= max_seqlen_q
        if length == 0:
            continue
        keys, values = (x[block_table[r].long()].flatten(0, 1)[:length].double() for x in (k, v))
        group = q.shape[1] // k.shape[2]
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("thd,shd->hts", q[begin:end].double(), keys) * softmax_scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap).half().double()
        at, position = torch.arange(length - (end - begin), length)[:, None], torch.arange(length)
        scores = scores.masked_fill(position > at, float("-inf"))
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        sums = weights.sum(-1).T[..., None]
        out[begin:end] = (torch.einsum("hts,shd->thd", weights.bfloat16().double(), values) / sums).to(out.dtype)


@pytest.mark.parametrize("options", [{}, {"soft_cap": 1.5}], ids=str)
def test_prefill_through_flash_attention(options, generator, monkeypatch):
    monkeypatch.setattr(vendor, "_flash_attention", lambda: flash_attention)
    op = ops.PAGED_ATTENTION
    inputs, attributes = op.sample(generator, torch.bfloat16, REQUESTS, 4, 2, 32, 16)

    def run(options):
        out = torch.full_like(inputs["q"], float("nan"))
        vendor.paged_attention(**inputs, out=out, **attributes, **options)
        return (out,)

    expected = harness.results(op, inputs, attributes | options)
    harness.assert_matches(op, run(options), expected)
    with pytest.raises(AssertionError):
        harness.assert_matches(op, run({"soft_cap": 0.5}), expected)


SMALL = {"heads": {"groups": (6, 2, 32, 16), "alone": (4, 4, 64, 32)}, "device": "cpu"}
BATCH = ((1, 1), (1, 20), (1, 21), (30, 190), (1, 300), (40, 40), (2, 101), (0, 0))


def without_cap(*, softcap, **rest):
    flash_attention(softcap=0.0, **rest)


def without_the_newest(*, seqused_k, **rest):
    flash_attention(seqused_k=(seqused_k - 1).clamp(min=0), **rest)


@pytest.mark.parametrize(
    ("function", "fails"),
    [
        (flash_attention, lambda soft_cap: False),
        (without_cap, lambda soft_cap: soft_cap),
        (without_the_newest, lambda soft_cap: True),
    ],
)
def test_comparison_of_the_gpu_machine(function, fails, monkeypatch, capsys):
    """Of all caps those fail that have what is done wrongly."""
    monkeypatch.setattr(vendor, "_flash_attention", lambda: function)
    cuda_flash_cases.check(SEED, requests=BATCH, **SMALL)
    report = capsys.readouterr().out
    for name, soft_cap in product(SMALL["heads"], cuda_flash_cases.SOFT_CAPS):
        found = re.search(rf"{name} soft cap {soft_cap}: \d+ of \d+ differ", report)
        assert bool(found) == bool(fails(soft_cap)), (name, soft_cap, report)
    assert ("0 failed" in report) == (function is flash_attention)


def test_gpu_machine_without_vllm(monkeypatch, capsys):
    monkeypatch.setattr(vendor, "_flash_attention", lambda: None)
    assert cuda_flash_cases.check(SEED, requests=BATCH, **SMALL) == 0
    assert "skipped" in capsys.readouterr().out


def test_gpu_machine_without_tvm():
    """TVM's package is not even looked for."""
    code = "import sys; sys.modules['tvm'] = None; sys.argv[1:] = ['flash']\n"
    code += "from tests.schedules import cuda_cases\n"
    code += "assert not cuda_cases.main() and 'tvm_ffi' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "FlashAttention" in done.stdout
