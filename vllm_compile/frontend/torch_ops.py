"""Custom torch operators that keep a piece of a model whole through torch.export.

They exist for tracing on meta tensors only: each has a shape rule and no kernel.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface

from vllm_compile.errors import UnsupportedError

NAMESPACE = "vllm_compile"
ATTENTION = "vllm_compile"  # the name under which transformers finds our attention

library = torch.library.Library(NAMESPACE, "DEF")
library.define(
    "causal_attention(Tensor q, Tensor k, Tensor v, int layer, float scale, int window, float soft_cap) -> Tensor"
)
library.define("layer_boundary(Tensor x, int index) -> Tensor")
library.define("layer_repeat(Tensor x, int index, int first) -> Tensor")
library.define("position_table(Tensor positions, int index, SymInt width, ScalarType dtype) -> Tensor")


@torch.library.register_fake(f"{NAMESPACE}::causal_attention", lib=library)
def _causal_attention(q, k, v, layer, scale, window, soft_cap):
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[3])


@torch.library.register_fake(f"{NAMESPACE}::layer_boundary", lib=library)
def _layer_boundary(x, index):
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::layer_repeat", lib=library)
def _layer_repeat(x, index, first):
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::position_table", lib=library)
def _position_table(positions, index, width, dtype):
    return positions.new_empty(1, positions.shape[0], width, dtype=dtype)


# Tensors that models hand to every attention function, whether it reads them or not.
HARMLESS = {"position_ids", "cache_position"}


def attention(
    module: nn.Module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **options
):
    """Attention as one operator: causal, maybe within a sliding window, its scores maybe capped.

    Raises:
        UnsupportedError: the layer asks for something else; layer and option are named.
    """
    where = f"{type(module).__name__} of layer {module.layer_idx}"
    if not options.get("is_causal", getattr(module, "is_causal", True)):
        raise UnsupportedError(f"{where}: attention that is not causal is not supported")
    if attention_mask is not None:
        raise UnsupportedError(f"{where}: an attention mask of the model's own making is not supported")
    if unknown := [name for name, value in options.items() if isinstance(value, torch.Tensor) and name not in HARMLESS]:
        raise UnsupportedError(f"{where}: attention with {', '.join(unknown)} is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, cap = int(sliding_window or 0), float(softcap or 0)
    traced = torch.ops.vllm_compile.causal_attention(query, key, value, module.layer_idx, float(scale), window, cap)
    return traced, None


AttentionInterface.register(ATTENTION, attention)


def mark_layers(layers: nn.ModuleList, head: nn.Module) -> None:
    """Put a `layer_boundary` before each decoder layer, behind the last, and before the output projection."""

    def before(index: int):
        def hook(module, args, kwargs):
            if args:
                return (torch.ops.vllm_compile.layer_boundary(args[0], index), *args[1:]), kwargs
            marked = torch.ops.vllm_compile.layer_boundary(kwargs["hidden_states"], index)
            return args, {**kwargs, "hidden_states": marked}

        return hook

    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(before(index), with_kwargs=True)
    count = len(layers)
    layers[-1].register_forward_hook(lambda module, args, out: torch.ops.vllm_compile.layer_boundary(out, count))
    head.register_forward_pre_hook(before(count + 1), with_kwargs=True)
