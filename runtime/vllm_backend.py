"""What vLLM must know about attention: how the paged cache lies in memory, and what each step looks like.

There is no arithmetic here.  vLLM's runner allocates the cache in the layout this backend
names and builds the step's metadata; the compiled program reads both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)


@dataclass
class PagedMetadata:
    """One step's batch, as the compiled program takes it.  R and T may include padding.

    Attributes:
        block_table: int32 [R, W], the cache blocks of each request; the null block 0 where unused.
        seq_lens: int32 [R], tokens in the cache once this step is done; 0 for a padding row.
        query_start_loc: int32 [R + 1], where each request's tokens begin; repeats for a padding row.
        slot_mapping: int64 [T], `block * block_size + offset` for each token; -1 for padding.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor


class PagedMetadataBuilder(AttentionMetadataBuilder[PagedMetadata]):
    """Picks the four device tensors out of vLLM's metadata: no copy, no look at a length on the host."""

    # Grids come from the padded shapes alone, so a graph of a decode step can be replayed for any lengths.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    # Decode and prefill rows may come in any order.
    reorder_batch_threshold = None

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> PagedMetadata:
        return PagedMetadata(
            block_table=common_attn_metadata.block_table_tensor,
            seq_lens=common_attn_metadata.seq_lens,
            query_start_loc=common_attn_metadata.query_start_loc,
            slot_mapping=common_attn_metadata.slot_mapping,
        )


class PagedImpl(AttentionImpl):
    """Stands where vLLM looks for a layer's `impl`; the compiled program computes attention itself."""

    def __init__(self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *_, **__):
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError("attention runs inside the compiled program")


class PagedBackend(AttentionBackend):
    """Cache of shape [blocks, kv_heads, block_size, head_dim + value_dim], keys before values in the last axis.

    Memory order is the same (head-major): the tokens of one head in one block are contiguous,
    which is the order attention reads them in.
    """

    supported_dtypes = [torch.bfloat16, torch.float32]  # noqa: RUF012 (the base class declares a list)

    @staticmethod
    def get_name() -> str:
        return "VLLM_COMPILE"

    @staticmethod
    def get_impl_cls() -> type[PagedImpl]:
        return PagedImpl

    @staticmethod
    def get_builder_cls() -> type[PagedMetadataBuilder]:
        return PagedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, int, int, int]:
        """Asked by vLLM up to 0.30, which knows one width for keys and values."""
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """Asked by vLLM up to 0.30; NotImplementedError tells it not to interleave the layers."""
        if include_num_layers_dimension:
            raise NotImplementedError
        return 0, 1, 2, 3

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Asked by vLLM from 0.31 on."""
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def use_cascade_attention(*_: Any, **__: Any) -> bool:
        return False
