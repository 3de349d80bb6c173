"""What of a graph is refused before any of it is converted, and how a node is named then."""

from __future__ import annotations

from collections.abc import Container

from vllm_compile.errors import UnsupportedError

from .attention import ATTENTION, past_of
from .attention import CONVERTERS as MICROSOFTS
from .graph import Node, OnnxGraph
from .tensors import FLOATS

# Attention is Microsoft's own; so is its RotaryEmbedding: ONNX has another one.
STANDARD, MICROSOFT = frozenset({"", "ai.onnx"}), frozenset({"com.microsoft"})
QUANTISED = frozenset(
    {
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "GatherBlockQuantized",
        "MatMulBnb4",
        "MatMulInteger",
        "MatMulNBits",
        "QLinearMatMul",
        "QMoE",
        "QuantizeLinear",
    }
)


def native_dtype(graph: OnnxGraph) -> str:
    """What a graph computes in: the dtype of the keys and values that it is given.

    Raises:
        UnsupportedError: it has no attention that we know, or a quantised cache.
    """
    for node in graph.nodes:
        if node.op in ATTENTION:
            element = graph.inputs.get(past_of(node).key)
            if element not in FLOATS:
                raise UnsupportedError(f"{graph.file}: {node}: a quantised KV cache is not supported")
            return FLOATS[element]
    named = sorted({node.op for node in graph.nodes if "Attention" in node.op})
    found = f"its attention is {', '.join(named)}" if named else "it has no attention"
    raise UnsupportedError(f"{graph.file}: {found}; {', '.join(ATTENTION)} is supported (docs/models.md)")


def check_operators(graph: OnnxGraph, nodes: list[Node], known: Container[str]) -> None:
    """Refuse operators that nothing converts, before any is converted.

    Raises:
        UnsupportedError: with the node, and where it stands.
    """
    for number, node in enumerate(nodes):
        if node.op in known and node.domain in (MICROSOFT if node.op in MICROSOFTS else STANDARD | MICROSOFT):
            continue
        where = f"{graph.file}: {node} ({place(nodes, number)})"
        if node.op in QUANTISED:
            raise UnsupportedError(f"{where}: quantised models are not supported; export it in fp32, fp16 or bf16")
        raise UnsupportedError(f"{where}: operator {node.op} of {node.domain or 'ONNX'} is not supported")


def place(nodes: list[Node], number: int) -> str:
    """Where a node stands: between which attentions, for a graph does not say where a layer begins."""
    before = sum(node.op in ATTENTION for node in nodes[:number])
    after = before + any(node.op in ATTENTION for node in nodes[number:])
    sides = [f"behind the attention of layer {before - 1}"] if before else []
    return " and ".join([*sides, *([f"before that of layer {before}"] if after > before else [])])
