"""Where a model's files are: a Hugging Face directory, or an ONNX graph and what lies beside it.

Imports neither TVM nor torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelError
from .frontend.onnx.file import tensor_files

CONFIG, GENAI_CONFIG = "config.json", "genai_config.json"
ONNX_SUFFIX = ".onnx"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template*",
)
PICKLED_WEIGHTS = "pytorch_model*.bin"  # Hugging Face's older format, which is not read
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class ModelFiles:
    """A model's directory; `graph` is the name of its ONNX file, None for a model of Hugging Face."""

    directory: Path
    graph: str | None = None

    def all(self, with_weights: bool) -> list[str]:
        """Names of the files that an artifact is made from; a graph holds tables too, so that it is always read."""
        return [*self.configs(), *self.copied(), *(self.weights() if with_weights or self.graph else [])]

    def described(self, with_weights: bool) -> list[str]:
        """Names of those of them that say what is computed: all but the tokenizer's."""
        return [*self.configs(), *(self.weights() if with_weights or self.graph else [])]

    def configs(self) -> list[str]:
        """Names of the files that hold the configuration."""
        if self.graph is None:
            return [CONFIG]
        return [name for name in (CONFIG, GENAI_CONFIG) if (self.directory / name).is_file()]

    def copied(self) -> list[str]:
        """Names of the files that an artifact has too: the tokenizer and what belongs to it."""
        return sorted({path.name for p in TOKENIZER_FILES for path in self.directory.glob(p) if path.is_file()})

    def weights(self) -> list[str]:
        """Names of the files that hold the weights, and of those that say which is in which.

        Raises:
            ModelError: an ONNX file cannot be read.
        """
        if self.graph is None:
            return sorted(path.name for pattern in WEIGHT_FILES for path in self.directory.glob(pattern))
        beside = tensor_files(self.directory / self.graph)
        return [self.graph, *(name for name in beside if (self.directory / name).is_file())]


def find_files(model: Path) -> ModelFiles:
    """The files of a model: `model` is its directory, or its ONNX file.

    A directory is ONNX's if it has no safetensors, and names a graph in genai_config.json or holds just one.

    Raises:
        ModelError: genai_config.json is damaged; or there is a graph beside weights in Hugging Face's older format, so
            that either could be meant.
    """
    if model.suffix == ONNX_SUFFIX and not model.is_dir():
        return ModelFiles(model.parent, model.name)
    if not any(True for _ in model.glob("*.safetensors")):
        if (model / GENAI_CONFIG).is_file():
            return ModelFiles(model, _named_graph(model))
        graphs = list(model.glob(f"*{ONNX_SUFFIX}"))
        if len(graphs) == 1:
            if pickled := next(model.glob(PICKLED_WEIGHTS), None):
                raise ModelError(
                    f"{model}: {graphs[0].name} or {pickled.name}, which is to be compiled?  Name the graph to take "
                    "that; Hugging Face's weights are read from safetensors alone"
                )
            return ModelFiles(model, graphs[0].name)
    return ModelFiles(model)


def _named_graph(directory: Path) -> str:
    """The decoder's file, in genai_config.json."""
    decoder = genai_model(directory).get("decoder")
    name = decoder.get("filename") if isinstance(decoder, dict) else None
    if not isinstance(name, str) or Path(name).name != name:
        raise ModelError(f"{directory / GENAI_CONFIG}: model.decoder.filename does not name a file beside it")
    return name


def genai_model(directory: Path) -> dict[str, Any]:
    """What genai_config.json says of the model; nothing where there is no such file.

    Raises:
        ModelError: it is damaged.
    """
    file = directory / GENAI_CONFIG
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: not a configuration of ONNX Runtime GenAI ({error})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file}: not a configuration of ONNX Runtime GenAI")
    return found
