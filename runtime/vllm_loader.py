"""Lets an artifact read its own weights: they are packed, and vLLM's readers would copy them once more."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import BaseModelLoader


class DummyLoader(BaseModelLoader):
    """Random weights, made on the device: `--load-format dummy`."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing is read but the plan."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        program: Any = model.program
        program.load_dummy_weights()


class ArtifactLoader(BaseModelLoader):
    def download_model(self, model_config: ModelConfig) -> None:
        """An artifact is a local directory."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        program: Any = model.program
        program.load_weights()
