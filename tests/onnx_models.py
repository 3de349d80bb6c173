"""Small models as ONNX Runtime GenAI's own builder writes them, and ONNX Runtime's own results for them."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel

from tests import models
from tests.conftest import SEED
from tests.greedy import Tokens, decided
from vllm_compile.frontend.model import Model
from vllm_compile.frontend.read_model import read_model
from vllm_compile.model_files import find_files

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
builder = pytest.importorskip("onnxruntime_genai.models.builder")

GRAPH = "model.onnx"
VOCABULARY = 160
SIZES = {"hidden_size": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 96}

# What the builder has for each precision; the graphs differ in details.
PROVIDERS = {"fp32": "cpu", "int4": "cpu", "fp16": "cuda", "bf16": "cuda"}


def build(
    directory: Path, model: PreTrainedModel, precision: str = "fp32", provider: str | None = None, **options: Any
) -> Path:
    """The directory of the ONNX model made of a model of Hugging Face, whose own is beside it."""
    source, out, provider = directory / "hf", directory / precision, provider or PROVIDERS[precision]
    if not source.exists():
        model.save_pretrained(source)
        words = {f"word{i}": i for i in range(VOCABULARY)}
        Tokenizer(WordLevel(words, unk_token="word0")).save(str(source / "tokenizer.json"))
        (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    asked = [f"{name}={value}" for name, value in options.items()]
    arguments = ("", str(source), str(out), precision, provider, str(directory / "cache"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.create_model(*arguments, **builder.parse_extra_options(*arguments, asked))
    return out


def logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """ONNX Runtime's on the CPU, for one prompt: [T, V]."""
    session = onnxruntime.InferenceSession(directory / GRAPH, providers=["CPUExecutionProvider"])
    head_dim = json.loads((directory / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    tokens = len(ids)
    whole = {
        "input_ids": ids[None].long().numpy(),
        "attention_mask": np.ones((1, tokens), np.int64),
        "position_ids": np.arange(tokens)[None],
    }
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feed = {
        given.name: whole[given.name]
        if given.name in whole
        else np.zeros((1, given.shape[1], 0, head_dim), dtypes[given.type])
        for given in session.get_inputs()
    }
    return torch.from_numpy(session.run(["logits"], feed)[0][0])


def continued(directory: Path, ids: torch.Tensor, new_tokens: int) -> Tokens:
    """ONNX Runtime's greedy continuation, as far as it is decided."""
    text, rows = ids, []
    for _ in range(new_tokens):
        rows.append(logits(directory, text)[-1])
        text = torch.cat([text, rows[-1].argmax().view(1)])
    return decided(torch.stack(rows))


def edit(directory: Path, change: Callable[[Any], None]) -> None:
    """Change the graph in a directory; its tensors stay where they are."""
    graph = onnx.load(directory / GRAPH, load_external_data=False)
    change(graph.graph)
    onnx.save(graph, directory / GRAPH)


def set_attribute(graph: Any, op: str, name: str, value: Any) -> None:
    """Of the first node of that operator."""
    node = next(node for node in graph.node if node.op_type == op)
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def write_out_norms(graph: Any, reciprocal: bool, opset: int) -> None:
    """SimplifiedLayerNormalization, and that of a sum, in plain operators: x times one over the root, or x over it."""
    make, nodes = onnx.helper.make_node, []
    numbers = {"two": np.asarray(2, np.float32), "one": np.asarray(1, np.float32), "last": np.asarray([-1])}
    for node in graph.node:
        if "SimplifiedLayerNormalization" not in node.op_type:
            nodes.append(node)
            continue
        x, weight, y = node.input[0], node.input[-1], node.output[0]
        if node.op_type.startswith("Skip"):
            x = node.output[3] if len(node.output) > 3 else f"{y}/sum"
            nodes.append(make("Add", [*node.input[:2]], [x]))
        epsilon = next(attribute.f for attribute in node.attribute if attribute.name == "epsilon")
        numbers[f"{y}/epsilon"] = np.asarray(epsilon, np.float32)
        axes = (["last"], {}) if opset >= 18 else ([], {"axes": [-1]})
        nodes += [
            make("Pow", [x, "two"], [f"{y}/squares"]) if reciprocal else make("Mul", [x, x], [f"{y}/squares"]),
            make("ReduceMean", [f"{y}/squares", *axes[0]], [f"{y}/mean"], **axes[1]),
            make("Add", [f"{y}/mean", f"{y}/epsilon"], [f"{y}/variance"]),
            make("Sqrt", [f"{y}/variance"], [f"{y}/root"]),
            *([make("Div", ["one", f"{y}/root"], [f"{y}/reciprocal"])] if reciprocal else []),
            make("Mul", [x, f"{y}/reciprocal"], [f"{y}/wide"])
            if reciprocal
            else make("Div", [x, f"{y}/root"], [f"{y}/wide"]),
            make("Cast", [f"{y}/wide"], [f"{y}/normed"], to=onnx.TensorProto.FLOAT),
            make("Mul", [f"{y}/normed", weight], [y]),
        ]
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in numbers.items())
    del graph.node[:]
    graph.node.extend(nodes)


def set_input(graph: Any, op: str, index: int, name: str) -> None:
    """Of the first node of that operator."""
    node = next(node for node in graph.node if node.op_type == op)
    node.input.extend([""] * (index + 1 - len(node.input)))
    node.input[index] = name


def llama(**changes) -> PreTrainedModel:
    """A random one in float32, to be built."""
    return models.llama(SEED, **SIZES | {"initializer_range": 0.15} | changes)


def opened(directory: Path, dtype: str | None = None, **changes) -> Model:
    """What is imported of the ONNX model there."""
    return read_model(find_files(directory), dtype, **{"dummy_seed": None} | changes)
