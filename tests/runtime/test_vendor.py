"""What FlashAttention is asked for, with a stand-in that does what its documentation says of these arguments."""

import pytest
import torch

from tests.schedules import harness
from vllm_compile import ops
from vllm_compile.runtime import vendor

REQUESTS = ((5, 30), (9, 9), (1, 37))


def flash_attention(
    q, k, v, out, cu_seqlens_q, max_seqlen_q, seqused_k, max_seqlen_k, block_table, softmax_scale, causal,
    window_size, softcap, fa_version,
):  # fmt: skip
    """Query i of a request sees [i + length - queries - left, i + length - queries + right]; (-1, -1) is no window."""
    assert causal
    assert fa_version == 3
    left, right = window_size or (-1, -1)
    for r, length in enumerate(seqused_k.tolist()):
        begin, end = cu_seqlens_q[r : r + 2].tolist()
        assert length <= max_seqlen_k
        assert end - begin <= max_seqlen_q
        keys, values = (x[block_table[r].long()].flatten(0, 1)[:length].double() for x in (k, v))
        group = q.shape[1] // k.shape[2]
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("thd,shd->hts", q[begin:end].double(), keys) * softmax_scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        at, position = torch.arange(length - (end - begin), length)[:, None], torch.arange(length)
        seen = position <= (at + right if right >= 0 else at)
        if left >= 0:
            seen &= position >= at - left
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hts,shd->thd", weights, values).to(out.dtype)


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"soft_cap": 1.5}, {"window": 2, "soft_cap": 1.5}], ids=str)
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
    for name, other in (("window", options.get("window", 0) + 1 if "window" in options else 7), ("soft_cap", 0.5)):
        with pytest.raises(AssertionError):
            harness.assert_matches(op, run(options | {name: other}), expected)
