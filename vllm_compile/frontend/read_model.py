"""Reads a model: a directory of Hugging Face's, or an ONNX graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_compile.errors import ModelError, UnsupportedError
from vllm_compile.model_files import CONFIG, ModelFiles

from .checkpoint import Checkpoint, DummyCheckpoint
from .conversion import open_checkpoint
from .families import long_positions, max_positions
from .hf import TracedModel, read_config, trace
from .importer import ImportedModel, import_model
from .model import DTYPES, Model, supported_dtype


def read_model(files: ModelFiles, dtype: str | None, dummy_seed: int | None) -> Model:
    """Import a model, to be computed in `dtype` (None: its own), with random weights if there is a seed.

    Raises:
        ModelError: files are missing or damaged, or do not fit together.
        UnsupportedError: an architecture, operator, dtype or shape is not supported; it is named.
    """
    if files.graph is not None:
        from .onnx.model import read_onnx

        return read_onnx(files, dtype, dummy_seed)
    config = read_config(files.directory)
    dtype = dtype_of(config, dtype)
    traced = trace(config, DTYPES[dtype])
    checkpoint = open_checkpoint(files.directory, traced.shapes, DTYPES[dtype], dummy_seed, traced.conversions)
    imported = import_model(traced, max_positions(config))
    _check_tensors(files.directory, traced, imported, checkpoint)
    fields = json.loads((files.directory / CONFIG).read_text())
    read = _reader(traced, imported, checkpoint)
    positions = max_positions(config), long_positions(config)
    return Model(config, fields, dtype, *positions, imported.module, read)


def dtype_of(config: Any, asked: str | None) -> str:
    """What a model is computed in: what is asked for, else its own dtype; UnsupportedError if we cannot."""
    if quantization := getattr(config, "quantization_config", None):
        given = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = given.get("quant_method", "unknown")
        raise UnsupportedError(f"checkpoints quantised by {method} are not supported yet; compile the original weights")
    return supported_dtype(asked or str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch."))


def _check_tensors(
    source: Path, traced: TracedModel, imported: ImportedModel, checkpoint: Checkpoint | DummyCheckpoint
) -> None:
    """Miss a tensor, or find one of another shape than the configuration's, before the kernels are built."""
    stored = {n: [alias for alias in traced.aliases[n] if alias in checkpoint] for n in imported.weights.values()}
    if missing := sorted(name for name, found in stored.items() if not found):
        raise ModelError(f"{source}: tensors missing in its safetensors: {', '.join(missing[:5])}")
    for name, found in stored.items():
        expected = next(traced.shapes[alias] for alias in traced.aliases[name] if alias in traced.shapes)
        for alias in found:
            if (shape := checkpoint.shape(alias)) != expected:
                tied = f", being tied to {found[0]}" if alias != found[0] else ""
                raise ModelError(
                    f"{alias}: shape {list(shape)} in the checkpoint, config.json says {list(expected)}{tied}"
                )


def _reader(
    traced: TracedModel, imported: ImportedModel, checkpoint: Checkpoint | DummyCheckpoint
) -> Callable[[str], torch.Tensor]:
    """Gives the tensor of a parameter of the imported module: a position table or a checkpoint's weight."""

    def read(parameter: str) -> torch.Tensor:
        if parameter in imported.tables:
            return imported.tables[parameter]
        name = imported.weights[parameter]
        # Tied weights are one tensor under several names; a checkpoint may hold either.
        return checkpoint.read(next((n for n in traced.aliases[name] if n in checkpoint), name))

    return read
