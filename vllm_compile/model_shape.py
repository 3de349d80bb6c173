"""The shape of a model as its compiled functions have it."""

from __future__ import annotations

import tvm
from tvm import relax

from .call_specs import dimension, op_spec
from .errors import UnsupportedError
from .frontend.model import Model
from .fused_calls import attention_of
from .ops import op_of
from .relax_passes.base import Definitions
from .relax_passes.outline_layers import FORWARD, LOGITS
from .runtime.plan import ModelShape


def model_shape(model: Model, module: tvm.IRModule) -> ModelShape:
    """Sizes of the module behind all passes, and what the model says of its positions.

    Raises:
        UnsupportedError: its layers cache in different shapes.
    """
    forward, logits = module[FORWARD], module[LOGITS]
    caches = {tuple(map(dimension, p.ty.shape.values)) for p in forward.params if p.name.startswith("kv_")}
    if len(caches) != 1:
        raise UnsupportedError(
            f"{model.config.model_type}: layers whose KV caches have different shapes are not supported"
        )
    (_, num_kv_heads, _, width) = caches.pop()
    functions = (function for _, function in module.functions_items() if isinstance(function, relax.Function))
    calls = ((op_of(b.value), b.value) for function in functions for b in Definitions(function).bindings)
    specs = (attention_of(op_spec(op, call)) for op, call in calls if op is not None)
    queries = next(spec for spec in specs if spec is not None).input("q")
    num_heads, head_dim = queries.size(-2), queries.size(-1)
    return ModelShape(
        num_layers=sum(p.name.startswith("kv_") for p in forward.params),
        num_heads=num_heads,
        num_kv_heads=int(num_kv_heads),
        head_dim=head_dim,
        hidden_size=int(forward.ret_ty.shape.values[-1]),
        vocab_size=int(logits.ret_ty.shape.values[-1]),
        max_positions=model.max_positions,
        dtype=model.dtype,
        long_positions=model.long_positions,
        value_dim=None if width == 2 * head_dim else int(width) - head_dim,
    )
