"""An ONNX model with the configuration beside it.

ONNX Runtime GenAI's builder writes genai_config.json, which knows a model's kind, its length and its special tokens;
shapes are the graph's.  A config.json beside the graph is taken as it is, and must agree with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vllm_compile.errors import ModelError, UnsupportedError
from vllm_compile.frontend.checkpoint import DummyCheckpoint
from vllm_compile.frontend.families import max_positions
from vllm_compile.frontend.hf import read_config_file
from vllm_compile.frontend.model import DTYPES, Model, supported_dtype
from vllm_compile.model_files import CONFIG, GENAI_CONFIG, ModelFiles, genai_model

from .context import Names
from .graph import OnnxGraph, read_graph
from .importer import ImportedGraph, import_graph
from .refusals import native_dtype

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_onnx(files: ModelFiles, dtype: str | None, dummy_seed: int | None) -> Model:
    """Import the graph of `files`; see `read_model`."""
    assert files.graph is not None
    graph = read_graph(files.directory / files.graph)
    graph.initializers.check()
    kind = supported_dtype(dtype or native_dtype(graph))
    genai, beside = genai_model(files.directory), files.directory / CONFIG
    if not genai and not beside.is_file():
        raise ModelError(f"{files.directory}: neither {GENAI_CONFIG} nor {CONFIG}, which say what {files.graph} is")
    config = read_config_file(beside) if beside.is_file() else None
    context = genai.get("context_length", None if config is None else max_positions(config))
    if not isinstance(context, int) or context < 1:
        raise ModelError(f"{files.directory / GENAI_CONFIG}: model.context_length is {context}, not a number from 1 on")
    limit = context if config is None else min(context, max_positions(config))
    imported = import_graph(graph, _names(genai), kind, limit)
    if config is None:
        fields = _fields(files.directory / GENAI_CONFIG, genai, imported)
        config = _configuration(files.directory / GENAI_CONFIG, fields)
    else:
        fields = json.loads(beside.read_text())
        _check_shapes(beside, config, imported.shapes)
    read = _reader(graph, imported, DTYPES[kind], dummy_seed)
    return Model(config, fields, kind, imported.max_positions, 0, imported.module, read)


def _names(genai: dict[str, Any]) -> Names:
    """What the graph calls its inputs and its output: as the builder does, unless it is written down otherwise."""
    decoder, plain = genai.get("decoder") or {}, Names()
    inputs, outputs = decoder.get("inputs") or {}, decoder.get("outputs") or {}
    return Names(
        inputs.get("input_ids", plain.input_ids),
        inputs.get("position_ids", plain.position_ids),
        outputs.get("logits", plain.logits),
    )


def _fields(file: Path, genai: dict[str, Any], imported: ImportedGraph) -> dict[str, Any]:
    """A config.json for the graph, its shapes and lengths those that are compiled."""
    kind = genai.get("type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedError(
            f"{file}: models of type {kind} are not known to transformers; put the {CONFIG} it was built from beside it"
        )
    special = {name: genai[name] for name in TOKENS if name in genai}
    return {
        "model_type": kind,
        **imported.shapes,
        "max_position_embeddings": imported.max_positions,
        **special,
    }


def _configuration(file: Path, fields: dict[str, Any]) -> Any:
    try:
        return AutoConfig.for_model(**fields)
    except Exception as error:  # transformers raises whatever its validators do
        raise ModelError(f"{file}: {' '.join(str(error).split())}") from error


def _check_shapes(file: Path, config: Any, shapes: dict[str, int]) -> None:
    """ModelError where a configuration says otherwise than the graph that it lies beside."""
    for name, found in shapes.items():
        said = getattr(config, name, None)
        if said is not None and said != found:
            raise ModelError(f"{file}: {name} is {said}, the graph beside it has {found}")


def _reader(
    graph: OnnxGraph, imported: ImportedGraph, dtype: torch.dtype, dummy_seed: int | None
) -> Callable[[str], torch.Tensor]:
    """Gives the tensor of a parameter of the imported module; a weight is turned round where ONNX has it so."""
    stored = graph.initializers
    weights: Any = stored
    if dummy_seed is not None:
        weights = DummyCheckpoint({name: stored.shape(name) for name in stored.names()}, dtype, dummy_seed)

    def read(parameter: str) -> torch.Tensor:
        if parameter in imported.tables:
            return imported.tables[parameter]
        weight = imported.weights[parameter]
        tensor = weights.read(weight.name)
        return tensor.t() if weight.transposed else tensor

    return read
