"""The weights of a matrix product: how a call's are stored, and how its kernel reads them."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from vllm_compile.spec import DTYPE_BYTES, OpSpec, TensorSpec
from vllm_compile.targets import Target

from ..family import Config
from ..layouts import Layout, Panels
from ..lossless_panels import LosslessPanels
from .matmul_block import PlainWeights, Weights
from .matmul_lossless import LosslessWeights
from .matmul_words import Words


def weight_layout(spec: OpSpec, target: Target, gated: bool, lossless: bool) -> Layout:
    """The layout that every variant reads: a vector of words for each step along K."""
    if lossless:
        return LosslessPanels(target.vector_lanes, gated)
    return Panels(target.vector_lanes, Words.of(target, spec.input("x").dtype).size, gated)


def stored_weight(spec: OpSpec, target: Target, gated: bool, lossless: bool) -> TensorSpec:
    """The weight as it is stored."""
    layout, plain = weight_layout(spec, target, gated, lossless), spec.input("weight")
    return TensorSpec(layout.shape(tuple(plain.sizes())), layout.dtype(plain.dtype))


def panel_count(spec: OpSpec, target: Target, gated: bool) -> int:
    """Panels of the weight; of one expert's, if there are several."""
    halves, N = 2 if gated else 1, spec.input("weight").size(-2)
    return halves * -(-N // halves // target.vector_lanes)


def weights_of(tensor: tirx.Buffer, spec: OpSpec, config: Config, target: Target, gated: bool) -> Weights:
    """The weights in `tensor`, for a kernel with this configuration (matmul_tiles.py)."""
    words, (N, K) = Words.of(target, spec.input("x").dtype), spec.input("weight").sizes()[-2:]
    lanes, panels, ahead = words.vectors.lanes, config["panels"], config["prefetch"]
    stored = stored_weight(spec, target, gated, config["lossless"])
    if config["lossless"]:
        flat = T.decl_buffer((stored.nbytes() // 4,), "uint32", data=tensor.data, align=4)
        return LosslessWeights(flat, words.vectors, panels, N, K, ahead, config["words"] if config["many"] else 0)
    size = DTYPE_BYTES[stored.dtype]
    flat = T.decl_buffer((stored.nbytes() // (size * words.size),), words.type, data=tensor.data, align=size)
    return PlainWeights(flat, lanes, panels, -(-K // words.size), ahead)
