"""An ONNX file as plain data: nodes, inputs, and where its tensors are.  No tensor outside the file is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vllm_compile.errors import ModelError, UnsupportedError

from .file import parse
from .tensors import Initializers

OLDEST_OPSET = 13  # since when Split takes its sizes, and Squeeze its axes, as inputs


@dataclass(frozen=True)
class Node:
    """One operator of the graph; an input or output that is left out is called ""."""

    domain: str
    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.op} {self.name or 'that makes ' + self.outputs[0]}"

    def input(self, index: int) -> str:
        """The name of an input, "" where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass(frozen=True)
class OnnxGraph:
    """A graph whose nodes are in an order in which they can be run.

    Attributes:
        file: where it was read from.
        inputs: ONNX's number for the element type of each input.
        outputs: names of the results.
        constants: values of the graph's constant nodes.
        initializers: its weights and tables.
    """

    file: Path
    nodes: tuple[Node, ...]
    inputs: Mapping[str, int]
    outputs: tuple[str, ...]
    constants: Mapping[str, np.ndarray]
    initializers: Initializers
    producers: Mapping[str, Node] = field(repr=False)

    def needed(self, outputs: Iterable[str], operands: Callable[[Node], Iterable[str]]) -> list[Node]:
        """The nodes that `outputs` are computed by, in order; of a node's inputs only its `operands` count."""
        reached: set[str] = set()
        waiting = list(outputs)
        while waiting:
            name = waiting.pop()
            node = self.producers.get(name)
            if name not in reached and node is not None:
                waiting += operands(node)
            reached.add(name)
        return [node for node in self.nodes if not reached.isdisjoint(node.outputs)]

    def sources(self, name: str) -> set[str]:
        """The inputs of the graph that a value is computed from."""
        nodes = self.needed([name], lambda node: node.inputs)
        return {given for node in nodes for given in node.inputs if given in self.inputs} | (
            {name} & self.inputs.keys()
        )


def read_graph(file: Path) -> OnnxGraph:
    """Parse an ONNX file.

    Raises:
        ModelError: see `parse` and `places`.
        UnsupportedError: its operators are older than what we know.
    """
    model = parse(file)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if opset < OLDEST_OPSET:
        raise UnsupportedError(f"{file}: opset {opset} is not supported; export it with opset {OLDEST_OPSET} or later")
    from onnx import helper, numpy_helper

    nodes, constants = [], {}
    for proto in model.graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in proto.attribute}
        if proto.op_type == "Constant" and len(attributes) == 1:
            (value,) = attributes.values()
            is_tensor = "value" in attributes
            if is_tensor and value.data_location == value.EXTERNAL:
                raise ModelError(f"{file}: constant {proto.output[0]} lies outside the graph; make it an initializer")
            constants[proto.output[0]] = numpy_helper.to_array(value) if is_tensor else np.asarray(value)
            continue
        plain = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
        nodes.append(Node(proto.domain, proto.op_type, proto.name, tuple(proto.input), tuple(proto.output), plain))
    initializers = Initializers(file, model)
    inputs = {
        value.name: value.type.tensor_type.elem_type for value in model.graph.input if value.name not in initializers
    }
    outputs = tuple(value.name for value in model.graph.output)
    producers = {name: node for node in nodes for name in node.outputs if name}
    return OnnxGraph(file, tuple(nodes), inputs, outputs, constants, initializers, producers)
