"""Custom torch operators that keep a piece of a model whole through torch.export.

They exist for tracing on meta tensors only: each has a shape rule and no kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from vllm_compile.errors import UnsupportedError

NAMESPACE = "vllm_compile"
ATTENTION = "vllm_compile"  # the name under which transformers finds our attention
EXPERTS = "vllm_compile"  # and our experts

library = torch.library.Library(NAMESPACE, "DEF")
library.define(
    "causal_attention(Tensor q, Tensor k, Tensor v, int layer, float scale, int window, float soft_cap) -> Tensor"
)
library.define("layer_boundary(Tensor x, int index) -> Tensor")
library.define("moe(Tensor x, Tensor experts, Tensor scores, Tensor gate_up, Tensor down) -> Tensor")
library.define("limit_groups(Tensor scores, int groups, int kept, int best, bool zeros) -> Tensor")
library.define("layer_repeat(Tensor x, int index, int first) -> Tensor")
library.define("position_table(Tensor positions, int index, SymInt width, ScalarType dtype) -> Tensor")


@torch.library.register_fake(f"{NAMESPACE}::causal_attention", lib=library)
def _causal_attention(q, k, v, layer, scale, window, soft_cap):
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[3])


@torch.library.register_fake(f"{NAMESPACE}::layer_boundary", lib=library)
def _layer_boundary(x, index):
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::limit_groups", lib=library)
def _limit_groups(scores, groups, kept, best, zeros):
    return torch.empty_like(scores)


@torch.library.register_fake(f"{NAMESPACE}::layer_repeat", lib=library)
def _layer_repeat(x, index, first):
    return torch.empty_like(x)


@torch.library.register_fake(f"{NAMESPACE}::position_table", lib=library)
def _position_table(positions, index, width, dtype):
    return positions.new_empty(1, positions.shape[0], width, dtype=dtype)


@torch.library.register_fake(f"{NAMESPACE}::moe", lib=library)
def _moe(x, experts, scores, gate_up, down):
    return torch.empty_like(x)


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


def experts(module: nn.Module, hidden_states, top_k_index, top_k_weights):
    """The experts of a layer as one operator; `check_experts` has seen that they are such."""
    return torch.ops.vllm_compile.moe(hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj)


ALL_EXPERTS_FUNCTIONS[EXPERTS] = experts


def check_experts(model: nn.Module) -> None:
    """Refuse experts that are no MLPs gated by SiLU without biases.

    Raises:
        UnsupportedError: module and reason are named.
    """
    for name, module in model.named_modules():
        if hasattr(module, "is_concatenated") and (reason := _other_experts(module)):
            raise UnsupportedError(f"experts {name}: {reason} are not supported")


def _other_experts(module: nn.Module) -> str | None:
    if not module.has_gate or getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        return "experts that are not gated, or by code of their own,"
    if module.has_bias or module.is_transposed or not module.is_concatenated:
        return "biases, or weights that are transposed or interleaved,"
    activation = type(getattr(module, "act_fn", None)).__name__
    return None if activation in ("SiLU", "SiLUActivation") else f"experts with {activation}"


class ListIndices(TorchFunctionMode):
    """Within it, an index that is a list of one number is a slice: on meta tensors the list's number would be lost."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            args = (args[0], tuple(map(self._slice, args[1])))
        return func(*args, **kwargs or {})

    @staticmethod
    def _slice(index):
        if isinstance(index, list) and len(index) == 1 and isinstance(index[0], int):
            return slice(index[0], index[0] + 1 or None)
        return index


@contextmanager
def torch_attention(num_kv_heads: int) -> Iterator[None]:
    """Within it, torch's scaled_dot_product_attention is `causal_attention`; its calls number the layers.

    Keys and values with more than `num_kv_heads` heads are those, repeated.  The function itself is replaced, for
    it takes no `is_causal` that depends on the number of tokens, as tracing has it.
    """
    layers = itertools.count()

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
        layer = next(layers)
        if attn_mask is not None or not is_causal:
            raise UnsupportedError(f"layer {layer}: attention that is not causal, or masked, is not supported")
        k, v = (t[:, :: max(1, t.shape[1] // num_kv_heads)] for t in (k, v))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return torch.ops.vllm_compile.causal_attention(q, k, v, layer, scale, 0, 0.0).transpose(1, 2)

    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


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

    def behind(module, args, out):
        if isinstance(out, tuple):
            return (torch.ops.vllm_compile.layer_boundary(out[0], count), *out[1:])
        return torch.ops.vllm_compile.layer_boundary(out, count)

    layers[-1].register_forward_hook(behind)
    head.register_forward_pre_hook(before(count + 1), with_kwargs=True)
