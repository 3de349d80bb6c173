"""A test double for the compiled program: its interface, in plain torch, from a Hugging Face checkpoint."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vllm_compile.errors import ArtifactError

NEVER_PREPARED = "forward() before prepare()"


# Of engines that serve it.
OPTIONS = {
    "kv_cache_memory_bytes": 1 << 24,
    "block_size": 32,
    "max_num_batched_tokens": 64,
    "max_num_seqs": 8,
    "disable_log_stats": False,
}


class TorchProgram:
    """Llama without biases or rope scaling.

    `steps` records (T, R) of each forward, `frozen` how many objects garbage collection passed over while it loaded.

    As in the compiled program, the next call overwrites what the last one returned.
    """

    buckets = None
    device = torch.device("cpu")

    def __init__(self, directory: str, weights: bool = False):
        self.directory = Path(directory)
        config = json.loads((self.directory / "config.json").read_text())
        self.eps: float = config["rms_norm_eps"]
        self.theta: float = config["rope_parameters"]["rope_theta"]
        self.num_layers: int = config["num_hidden_layers"]
        self.num_heads: int = config["num_attention_heads"]
        self.num_kv_heads: int = config["num_key_value_heads"]
        self.hidden_size: int = config["hidden_size"]
        self.vocab_size: int = config["vocab_size"]
        self.head_dim: int = config.get("head_dim") or self.hidden_size // self.num_heads
        self.cache_width = 2 * self.head_dim
        self.max_positions: int = config["max_position_embeddings"]
        self.dtype: torch.dtype = getattr(torch, config["dtype"])
        self.weights: dict[str, torch.Tensor] = {}
        self.limits: tuple[int, int] | None = None
        self.steps: list[tuple[int, int]] = []
        if weights:
            self.load_weights()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]] | None = None) -> None:
        self.frozen = gc.get_freeze_count()
        self.weights = dict(weights or load_file(self.directory / "model.safetensors"))
        if "model.norm.weight" not in self.weights:
            raise ArtifactError("model.norm.weight is missing")

    def prepare(self, max_tokens: int, max_requests: int) -> None:
        self.limits = max_tokens, max_requests
        self.hidden_TD = torch.empty(max_tokens, self.hidden_size, dtype=self.dtype)
        self.logits_SV = torch.empty(max_tokens, self.vocab_size, dtype=self.dtype)
        self.tokens_S1 = torch.empty(max_tokens, 1, dtype=torch.int64)

    def embed(self, input_ids_T: torch.Tensor) -> torch.Tensor:
        return self.weights["model.embed_tokens.weight"][input_ids_T]

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        self.logits_SV.fill_(float("nan"))
        return self.logits_SV[: len(hidden_SD)].copy_(F.linear(hidden_SD, self.weights["lm_head.weight"]))

    def greedy(self, logits_SV: torch.Tensor) -> torch.Tensor:
        self.tokens_S1.fill_(-1)
        return self.tokens_S1[: len(logits_SV)].copy_(logits_SV.argmax(-1, keepdim=True))

    def forward(self, input_ids, positions, kv, block_table, seq_lens, query_start_loc, slot_mapping):
        # The references live beside TVM, which a serving process must not import before it has to.
        from vllm_compile.ops.paged_attention import reference as paged_attention
        from vllm_compile.ops.qkv_rope_cache import reference as qkv_rope_cache
        from vllm_compile.ops.rms_norm import reference as rms_norm

        self.check(input_ids, positions, kv, block_table, seq_lens, query_start_loc, slot_mapping)
        frequency = self.theta ** -(torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angle_TD = (positions[:, None] * frequency).repeat(1, 2)
        cos_TD, sin_TD = angle_TD.cos().to(self.dtype), angle_TD.sin().to(self.dtype)
        x_TD = self.embed(input_ids)
        for i in range(self.num_layers):
            w = {name: self.weights[f"model.layers.{i}.{name}.weight"] for name in LAYER_WEIGHTS}
            normed_TD = rms_norm(x_TD, w["input_layernorm"], self.eps)
            qkv = torch.cat([F.linear(normed_TD, w[f"self_attn.{name}_proj"]) for name in "qkv"], dim=-1)
            heads = self.num_heads, self.num_kv_heads, self.head_dim
            q_THD = qkv_rope_cache(qkv, cos_TD, sin_TD, kv[i], slot_mapping, *heads)
            out_THD = paged_attention(q_THD, kv[i], block_table, seq_lens, query_start_loc, self.head_dim**-0.5)
            x_TD = x_TD + F.linear(out_THD.flatten(1), w["self_attn.o_proj"])
            normed_TD = rms_norm(x_TD, w["post_attention_layernorm"], self.eps)
            gate, up = (F.linear(normed_TD, w[f"mlp.{name}_proj"]) for name in ("gate", "up"))
            x_TD = x_TD + F.linear(F.silu(gate) * up, w["mlp.down_proj"])
        hidden_TD = rms_norm(x_TD, self.weights["model.norm.weight"], self.eps)
        return self.hidden_TD.fill_(float("nan"))[: len(input_ids)].copy_(hidden_TD)

    def check(self, ids_T, positions_T, kv, table_RW, lens_R, starts_R1, slots_T):
        """What the compiled kernels take for granted."""
        assert self.limits is not None, NEVER_PREPARED
        tokens, requests = len(ids_T), len(lens_R)
        self.steps.append((tokens, requests))
        assert tokens <= self.limits[0]
        assert requests <= self.limits[1]
        assert positions_T.shape == slots_T.shape == (tokens,)
        assert table_RW.shape[0] == requests
        assert starts_R1.shape == (requests + 1,)
        dtypes = {torch.int32: (ids_T, table_RW, lens_R, starts_R1), torch.int64: (positions_T, slots_T)}
        for dtype, tensors in dtypes.items():
            assert all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in tensors)
        assert len(kv) == self.num_layers
        for cache in kv:
            assert cache.dtype == self.dtype
            assert cache.shape[1] == self.num_kv_heads
            assert cache.shape[3] == 2 * self.head_dim
            assert cache[0].is_contiguous()  # head-major blocks


LAYER_WEIGHTS = (
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def load(directory: str, weights: bool = True, check: bool = True) -> TorchProgram:
    return TorchProgram(directory, weights)
