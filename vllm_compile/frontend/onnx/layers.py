"""Finds where the decoder layers of a graph begin, which ONNX does not say."""

from __future__ import annotations

import tvm
from tvm import relax

from vllm_compile.errors import UnsupportedError
from vllm_compile.ops import CAUSAL_ATTENTION, LAYER_BOUNDARY, LINEAR
from vllm_compile.ops.base import arguments_of
from vllm_compile.relax_passes.base import Definitions, replace_bindings, used_vars


def mark_layers(module: tvm.IRModule) -> tvm.IRModule:
    """Put a `layer_boundary` before each decoder layer, behind the last, and before the output projection.

    Between two attentions there are values that everything behind depends on through them alone: the hidden
    states behind each residual add.  A layer begins at the last of these before its attention, so the last layer ends
    as many of them behind its attention as the others do.

    Raises:
        UnsupportedError: there are no such values, or no output projection.
    """
    main = module["main"]
    bindings = Definitions(main).bindings
    cuts = _cuts(main)
    attentions = [i for i, binding in enumerate(bindings) if CAUSAL_ATTENTION.matches(binding.value)]
    if not attentions:
        raise UnsupportedError("its logits depend on no attention")
    linear = [binding.value for binding in bindings if LINEAR.matches(binding.value)]
    hidden = arguments_of(linear[-1])["x"] if linear else None
    head = next((i for i in cuts if bindings[i].var.same_as(hidden)), -1)
    starts = []
    for layer, attention in enumerate(attentions):
        since = attentions[layer - 1] if layer else -1
        between = [i for i in cuts if since < i < attention]
        if not between:
            raise UnsupportedError(f"no hidden states before the attention of layer {layer} that it alone depends on")
        starts.append(between[-1])
    behind = [i for i in cuts if attentions[-1] < i < head]
    each = sum(attentions[-2] < i <= starts[-1] for i in cuts) if len(attentions) > 1 else len(behind)
    if not 0 < each <= len(behind):
        raise UnsupportedError("no hidden states between the last layer and the output projection")
    marks = [*starts, behind[each - 1], head]
    at = {}
    for index, place in enumerate(marks):
        binding = bindings[place]

        def mark(emit, binding=binding, index=index):
            return {binding.var: LAYER_BOUNDARY({"x": emit(binding.value)}, index=index)}

        at[binding.var] = mark
    module.update_func(module.get_global_var("main"), replace_bindings(module, main, at))
    return module


def _cuts(main: relax.Function) -> list[int]:
    """Numbers of the bindings through which alone what is behind depends on the token ids."""
    bindings = Definitions(main).bindings
    last_use = {var: i for i, binding in enumerate(bindings) for var in used_vars(binding.value)}
    dependent, cuts, latest = {main.params[0]}, [], -1
    for i, binding in enumerate(bindings):
        if dependent.isdisjoint(used_vars(binding.value)):
            continue
        if latest <= i:
            cuts.append(i)
        dependent.add(binding.var)
        latest = max(latest, last_use.get(binding.var, len(bindings)))
    return cuts
