"""Hugging Face's own forward pass, with weights that come and go layer by layer.

The model is built on meta tensors; hooks give each decoder layer (and each module outside
them) its weights just before it runs and take them away after, so that a model of any size
can be the reference on a machine that could not hold it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .frontend.checkpoint import Checkpoint, DummyCheckpoint
from .frontend.hf import adopt_buffers, decoder_layers, materialise_buffers, parameter_aliases
from .heap import trim

META = torch.device("meta")


class Reference:
    """Hugging Face's model in one dtype on one device.

    `run(ids)` gives the input of every decoder layer, the final hidden states and the logits.
    """

    def __init__(
        self, config: Any, checkpoint: Checkpoint | DummyCheckpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        with META:
            self._model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
        adopt_buffers(self._model)
        materialise_buffers(self._model)
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        self._checkpoint, self._device = checkpoint, device
        self._aliases = parameter_aliases(self._model)
        self._layer_inputs: list[torch.Tensor] = []
        self._final: list[torch.Tensor] = []
        layers = decoder_layers(self._model, config)
        inside = {id(module) for layer in layers for module in layer.modules()}
        prefixes = {id(module): name for name, module in self._model.named_modules()}
        outside = (
            m for m in self._model.modules() if id(m) not in inside and any(True for _ in m.parameters(recurse=False))
        )
        for module in [*layers, *outside]:
            self._stream(module, prefixes[id(module)])
        for layer in layers:
            layer.register_forward_pre_hook(self._record_layer, with_kwargs=True)
        head = self._model.get_output_embeddings()
        head.register_forward_pre_hook(lambda module, args: self._final.append(args[0].flatten(0, 1)))

    @staticmethod
    def model(config: Any) -> PreTrainedModel:
        """The model on meta tensors, for the names and shapes of its parameters."""
        with META:
            model = AutoModelForCausalLM.from_config(config)
        adopt_buffers(model)
        return model

    @staticmethod
    def shapes(config: Any) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of the model, by name."""
        return {name: tuple(p.shape) for name, p in Reference.model(config).named_parameters()}

    def run(self, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """ids [R, T] -> (inputs of the layers, each [R*T, D]; final hidden [R*T, D]; logits [R*T, V])."""
        self._layer_inputs.clear()
        self._final.clear()
        with torch.no_grad():
            logits = self._model(input_ids=ids.long(), use_cache=False).logits.flatten(0, 1)
        return list(self._layer_inputs), self._final[0], logits

    def _record_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._layer_inputs.append(hidden.flatten(0, 1).clone())

    def _stream(self, module: nn.Module, prefix: str) -> None:
        places = [(name, self._names(f"{prefix}.{name}")) for name, _ in module.named_parameters()]

        def load(*_: Any) -> None:
            for name, candidates in places:
                stored = next(n for n in candidates if n in self._checkpoint)
                _assign(module, name, self._checkpoint.read(stored).to(self._device, _get(module, name).dtype))

        def drop(*_: Any) -> None:
            for name, _ in places:
                _assign(module, name, _get(module, name).to(META))
            trim()

        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)

    def _names(self, name: str) -> tuple[str, ...]:
        return self._aliases[name]


def _get(module: nn.Module, name: str) -> nn.Parameter:
    return module.get_parameter(name)


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
