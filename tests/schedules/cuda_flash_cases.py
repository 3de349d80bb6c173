"""FlashAttention as vLLM ships it and as the runtime calls it (runtime/vendor.py), on a Hopper GPU against float64.

Decode, prompts and parts of prompts in one batch; soft caps, groups of query heads.  Every case runs with the cap that
is meant, over poison, and with another, which must be noticed.  No TVM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from vllm_compile.runtime import vendor

HEADS = {  # query heads, KV heads, head size, block size
    "mha": (8, 8, 64, 16),
    "llama_8b": (32, 8, 128, 16),
    "qwen_7b": (28, 4, 128, 64),
    "multi_query": (16, 1, 128, 128),
    "gemma_2": (8, 4, 256, 32),
}
# (queries, cached tokens) of each request: decode, prompts, parts of prompts, a padding row.
REQUESTS = ((1, 1), (37, 37), (1, 64), (1, 65), (150, 1200), (1, 1700), (300, 300), (2, 1001), (0, 0))
SOFT_CAPS = (0.0, 30.0)
SHARPNESS = 2.0  # standard deviation of scores: a cap of 30 shows
ANOTHERS = 1e3  # what rows of the cache hold that belong to no request
ROUNDING = 2.0**-7  # of probabilities to bf16, and of results: 2**-8 each of the sum of probabilities times |values|
TANH = 2.0**-10.9  # relative error of tanh.approx.f32 (PTX ISA), by which scores are capped

Inputs = dict[str, torch.Tensor]
Requests = tuple[tuple[int, int], ...]


def sample(
    generator: torch.Generator, requests: Requests, heads: int, kv_heads: int, D: int, block_size: int
) -> Inputs:
    """q [T, H, D] and kv [B, KH, N, 2 * D] in bf16, and where requests lie in it; blocks in random order."""
    width = max(-(-length // block_size) for _, length in requests)
    table = torch.randperm(len(requests) * width, generator=generator).view(len(requests), width)
    rows = torch.full((table.numel() * block_size, kv_heads, 2 * D), ANOTHERS)
    for r, (_, length) in enumerate(requests):
        at = torch.arange(length)
        slots = table[r, at // block_size] * block_size + at % block_size
        rows[slots] = torch.randn(length, kv_heads, 2 * D, generator=generator)
    queries = torch.tensor([0, *(count for count, _ in requests)])
    return {
        "q": (SHARPNESS * torch.randn(int(queries.sum()), heads, D, generator=generator)).bfloat16(),
        "kv": rows.view(-1, block_size, kv_heads, 2 * D).transpose(1, 2).contiguous().bfloat16(),
        "block_table": table.int(),
        "seq_lens": torch.tensor([length for _, length in requests], dtype=torch.int32),
        "query_start_loc": queries.cumsum(0).int(),
    }


def reference(inputs: Inputs, scale: float, soft_cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, H, D] in float64: results, and by how much a kernel's may differ."""
    q, kv = inputs["q"].double(), inputs["kv"]
    group, D = q.shape[1] // kv.shape[1], q.shape[2]
    expected, allowed = torch.zeros_like(q), torch.zeros_like(q)
    starts = inputs["query_start_loc"].tolist()
    for r, length in enumerate(inputs["seq_lens"].tolist()):
        if length == 0:
            continue
        begin, end = starts[r : r + 2]
        cached = kv[inputs["block_table"][r].long()].transpose(0, 1).flatten(1, 2)[:, :length].double()
        k, v = cached.repeat_interleave(group, 0).split(D, -1)
        scores = torch.einsum("thd,hsd->hts", q[begin:end], k) * scale
        if soft_cap:
            scores = soft_cap * (scores / soft_cap).tanh()
        at = torch.arange(length, device=q.device)
        hidden = at > at[length - (end - begin) :, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        expected[begin:end] = torch.einsum("hts,hsd->thd", weights, v)
        allowed[begin:end] = ROUNDING * torch.einsum("hts,hsd->thd", weights, v.abs())
        if soft_cap:  # absolute errors of scores are relative ones of probabilities, and of their sum
            errors = TANH * scores.abs()
            errors = weights * (errors + (weights * errors).sum(-1, keepdim=True))
            allowed[begin:end] += torch.einsum("hts,hsd->thd", errors, v.abs())
    return expected, allowed


def check(
    seed: int,
    heads: Mapping[str, tuple[int, int, int, int]] = HEADS,
    requests: Requests = REQUESTS,
    device: str = "cuda",
) -> int:
    """Run every case; returns the number that failed."""
    if not vendor.available("paged_attention"):
        print("FlashAttention: skipped, as vLLM's for Hopper cannot be imported here")
        return 0
    generator, ran, failed = torch.Generator().manual_seed(seed), 0, 0
    for name, sizes in heads.items():
        inputs = sample(generator, requests, *sizes)
        for soft_cap in SOFT_CAPS:
            ran += 1
            if problems := list(problems_of(inputs, soft_cap, device)):
                failed += 1
                print(f"FlashAttention {name} soft cap {soft_cap}: {'; '.join(problems)}", flush=True)
    print(f"FlashAttention: {ran} cases, {failed} failed (seed {seed})")
    return failed


def problems_of(inputs: Inputs, soft_cap: float, device: str) -> Iterator[str]:
    """What is wrong with one case."""
    scale = inputs["q"].shape[2] ** -0.5
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    expected, allowed = reference(given, scale, soft_cap)

    def wrong(soft_cap: float) -> str:
        out = torch.full_like(given["q"], float("nan"))
        vendor.paged_attention(**given, out=out, scale=scale, soft_cap=soft_cap)
        error = (out.double() - expected).abs()
        differ = ~(error <= allowed)  # nan does
        if not differ.any():
            return ""
        return f"{int(differ.sum())} of {differ.numel()} differ, by up to {error[differ].max():.3g}"

    if problem := wrong(soft_cap):
        yield problem
    if not wrong(SOFT_CAPS[0] if soft_cap else SOFT_CAPS[1]):
        yield "a wrong soft cap is not noticed"
