"""Attention over the whole batch becomes attention over a paged KV cache."""

from __future__ import annotations

import tvm
from tvm import relax, tirx

from vllm_compile.ops import CAUSAL_ATTENTION, KV_CACHE_WRITE, PAGED_ATTENTION
from vllm_compile.ops.base import arguments_of, attributes_of
from vllm_compile.spec import Sym

from .base import Definitions, Rewrite, clean, counted_pass, replace_bindings

HEADS_TO_ROWS = [0, 2, 1, 3]  # [1, H, T, D] -> [1, T, H, D]


@counted_pass("page_kv_cache")
def page_kv_cache(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """Give the model the signature that a serving engine calls, one KV cache per layer.

    Before:
        main(input_ids, positions, weights...)
        o = causal_attention(q, k, v, layer=i, scale=s)
    After:
        main(input_ids, positions, kv_0 ... kv_L-1, block_table, seq_lens, query_start_loc, slot_mapping,
             weights...)
        kv = kv_cache_write(permute_dims(k), permute_dims(v), kv_i, slot_mapping)
        o = paged_attention(permute_dims(q), kv, block_table, seq_lens, query_start_loc, scale=s)
    """
    function = module["main"]
    calls = [b for b in Definitions(function).bindings if CAUSAL_ATTENTION.matches(b.value)]
    dims = {sym: tirx.Var(sym, "int64") for sym in (Sym.BLOCKS, Sym.BLOCK_SIZE, Sym.REQUESTS, Sym.TABLE_WIDTH)}
    metadata = {
        "block_table": _tensor("block_table", [dims[Sym.REQUESTS], dims[Sym.TABLE_WIDTH]], "int32"),
        "seq_lens": _tensor("seq_lens", [dims[Sym.REQUESTS]], "int32"),
        "query_start_loc": _tensor("query_start_loc", [tirx.Var(Sym.BOUNDARIES, "int64")], "int32"),
    }
    input_ids, positions, *weights = function.params
    slots = _tensor("slot_mapping", list(input_ids.ty.shape.values), "int64")
    caches: list[relax.Var] = []
    at: dict[relax.Var, Rewrite] = {}
    for binding in calls:
        heads = arguments_of(binding.value)
        kv_heads = heads["v"].ty.shape.values[1]
        columns = sum(int(heads[name].ty.shape.values[3]) for name in ("k", "v"))
        layer = int(binding.value.attrs["layer"])
        shape = [dims[Sym.BLOCKS], kv_heads, dims[Sym.BLOCK_SIZE], columns]
        cache = _tensor(f"kv_{layer}", shape, heads["v"].ty.dtype)
        caches.append(cache)

        def rewrite(emit, binding=binding, heads=heads, cache=cache):
            q, k, v = (emit(relax.op.permute_dims(heads[name], HEADS_TO_ROWS)) for name in ("q", "k", "v"))
            written = emit(KV_CACHE_WRITE({"k": k, "v": v, "kv": cache, "slot_mapping": slots}))
            inputs = {"q": q, "kv": written, **metadata}
            attributes = attributes_of(binding.value)
            del attributes["layer"]
            return {binding.var: PAGED_ATTENTION(inputs, **attributes)}

        at[binding.var] = rewrite
    rewritten = replace_bindings(module, function, at)
    parameters = [input_ids, positions, *caches, *metadata.values(), slots, *weights]
    module.update_func(
        module.get_global_var("main"),
        relax.Function(parameters, rewritten.body, rewritten.ret_ty, attrs=function.attrs),
    )
    return clean(module), len(calls)


def _tensor(name: str, shape: list, dtype: str) -> relax.Var:
    return relax.Var(name, relax.TensorType(shape, dtype))
