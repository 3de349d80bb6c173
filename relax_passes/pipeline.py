"""The passes, in the order in which a model goes through them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import tvm

from vllm_compile.ops import ARGMAX, QKV_ROPE_ATTENTION

from .absorb_latent import absorb_latent
from .add_greedy import add_greedy
from .base import match_counts
from .fuse_add_rms_norm import fuse_add_rms_norm
from .fuse_elementwise import fuse_elementwise
from .fuse_gate_up import fuse_gate_up
from .fuse_layer_norm import fuse_layer_norm
from .fuse_residual import fuse_residual
from .fuse_rms_norm import fuse_rms_norm
from .fuse_rope_attention import fuse_rope_attention
from .fuse_rope_cache import fuse_rope_cache
from .lift_weights import lift_weights
from .merge_qkv import merge_qkv
from .outline_layers import outline_layers
from .page_kv_cache import page_kv_cache
from .record import PassRecord
from .route_experts import route_experts

PIPELINE = (
    page_kv_cache,  # whole-batch attention -> paged KV cache; the serving signature
    absorb_latent,  # keys and values made of one latent vector -> a cache of that
    outline_layers,  # one function per kind of layer; all passes below see each kind once
    fuse_layer_norm,  # written-out norm of x without its mean -> layer_norm
    fuse_rms_norm,  # written-out norm -> rms_norm
    fuse_gate_up,  # silu(gate) * up -> gate_up_silu
    route_experts,  # mixture of experts -> its router and grouped linear layers
    merge_qkv,  # parallel linear layers -> one
    fuse_rope_cache,  # rotate q, k and write the cache in one go
    fuse_rope_attention,  # the same and attention -> one operator, where there is a kernel for it
    fuse_add_rms_norm,  # residual add + norm, where the sum is normalised next
    fuse_residual,  # the other residual adds -> epilogue of their linear layer
    lift_weights,  # what depends on weights alone -> runs once, at compile time
    fuse_elementwise,  # whatever is left between two operators of ours -> one operator
    add_greedy,  # the most probable token, where there is a kernel for it
)

# Passes for what only some families have: without a match they are no cause for a warning.
OPTIONAL = frozenset({"absorb_latent", "fuse_layer_norm", "route_experts", "fuse_elementwise"})


# Passes whose operator not every target has kernels for.
IF_SERVED = {"fuse_rope_attention": QKV_ROPE_ATTENTION.name, "add_greedy": ARGMAX.name}


def passes_for(operators: Collection[str] = ()) -> list[Any]:
    """The passes for a target with kernels for `operators`, which need name only those that not every target has."""
    return [p for p in PIPELINE if IF_SERVED.get(p.info.name) in {None, *operators}]


def run_passes(
    module: tvm.IRModule,
    after_each: Callable[[str, tvm.IRModule], None] = lambda name, module: None,
    operators: Collection[str] = (),
) -> tuple[tvm.IRModule, list[PassRecord]]:
    """Send an imported model through all passes for a target with kernels for `operators`.

    `after_each(name, module)` is called behind every pass, for a dump of what it did.
    """
    passes = passes_for(operators)
    for transform in passes:
        module = transform(module)
        after_each(transform.info.name, module)
    counts = match_counts(module)
    return module, [PassRecord(p.info.name, counts[p.info.name]) for p in passes]
