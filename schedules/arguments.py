"""The arguments of a kernel as its call names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from vllm_compile.spec import DTYPE_BYTES, OpSpec, Sym, TensorSpec


def bind_arguments(
    spec: OpSpec, stored: Mapping[str, TensorSpec] | None = None, align: int = 1
) -> tuple[tirx.Var, dict[str, tirx.Buffer]]:
    """The number of tokens, and each input and `out` as a buffer, of the function that is being built.

    A scalar is one value [1].  `stored` tells of weights that lie in memory otherwise than `spec` says.
    Tensors start at a multiple of `align` bytes, and of a value's.
    """
    named = (*spec.inputs, ("out", spec.outputs[0]))
    handles = [T.arg(name, T.handle()) for name, _ in named]
    tokens = IRBuilder.name("tokens", T.int64())
    buffers = {}
    for handle, (name, plain) in zip(handles, named, strict=True):
        tensor = (stored or {}).get(name, plain)
        shape: Sequence[Any] = [tokens if dim == Sym.TOKENS else dim for dim in tensor.shape] or [1]
        buffer = T.match_buffer(handle, shape, tensor.dtype, align=max(align, DTYPE_BYTES[tensor.dtype]))
        buffers[name] = IRBuilder.name(name, buffer)
    return tokens, buffers
