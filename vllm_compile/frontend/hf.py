"""A Hugging Face model directory, traced into one graph without its weights."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vllm_compile.errors import ModelError, UnsupportedError
from vllm_compile.model_files import find_files

from .complex_parts import split_complex
from .conversion import weight_conversions
from .families import GROWING_ROPE, OWN_CODE, SUPPORTED, TORCH_ATTENTION, check_family, long_positions
from .group_limit import name_group_limits
from .in_place import replace_writes
from .position_tables import LongSequences
from .repeats import expand_repeats, find_repeats, without_repeats
from .torch_ops import ATTENTION, EXPERTS, ListIndices, check_experts, mark_layers, torch_attention
from .trace_errors import naming_the_module


@dataclass(frozen=True)
class TracedModel:
    """A model as torch.export sees it.

    Attributes:
        program: graph of `logits[T, V] = f(input_ids[T] int32, positions[T] int64)`.
        config: the model's own configuration.
        shapes: shape of every checkpoint tensor by name.
        aliases: parameter name -> all names it may have in a checkpoint (tied weights share one).
        conversions: how the parameters are made from a checkpoint's tensors, where they are not just these.
        long: what changes where sequences may be longer than `families.max_positions`.
    """

    program: torch.export.ExportedProgram
    config: Any
    shapes: dict[str, tuple[int, ...]]
    aliases: dict[str, tuple[str, ...]]
    conversions: tuple[WeightTransform, ...] = ()
    long: LongSequences = field(default_factory=LongSequences)


class _Flat(nn.Module):
    """The model on one flat batch of tokens, as a serving engine calls it."""

    def __init__(self, model: nn.Module, num_kv_heads: int | None) -> None:
        super().__init__()
        self.model, self.num_kv_heads = model, num_kv_heads

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        attention = nullcontext() if self.num_kv_heads is None else torch_attention(self.num_kv_heads)
        with attention, ListIndices():
            out = self.model(input_ids=input_ids[None], position_ids=positions[None], use_cache=False)
        return out.logits


def read_config(directory: Path) -> Any:
    """The model's configuration; code that a checkpoint brings along is never run.

    Raises:
        ModelError: no directory, no config.json, or one that cannot be read.
        UnsupportedError: an ONNX model, or no causal language model that transformers has.
    """
    if find_files(directory).graph is not None:
        raise UnsupportedError(
            f"{directory}: an ONNX model, where the Hugging Face one that it was built from is needed"
        )
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory")
    return read_config_file(directory / "config.json")


def read_config_file(file: Path) -> Any:
    """The configuration in a file of any name; raises what `read_config` does."""
    try:
        raw = json.loads(file.read_text())
    except OSError as error:
        raise ModelError(f"{file.parent}: {file.name} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ModelError(f"{file}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{file}: not a model's configuration")
    kind = raw.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        named = ", ".join(map(str, raw.get("architectures") or [kind]))
        what = f"{file.parent}: architecture {named} is not a causal language model of transformers"
        raise UnsupportedError(f"{what}; {SUPPORTED}")
    try:
        return AutoConfig.from_pretrained(file, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its validators do
        raise ModelError(f"{file}: {' '.join(str(error).split())}") from error


def trace(config: Any, dtype: torch.dtype) -> TracedModel:
    """Trace the model on meta tensors: no weight is made, whatever its size.

    Raises:
        UnsupportedError: the model has options that our attention does not express, or
            torch.export cannot trace it.
    """
    check_family(config)
    model = _build(config, dtype)
    check_experts(model)
    materialise_buffers(model)
    long = long_sequences(model)
    settle_rope(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    aliases = parameter_aliases(model)
    layers = decoder_layers(model, config)
    mark_layers(layers, model.get_output_embeddings())
    tokens = torch.export.Dim("T", min=2, max=1 << 20)
    ids = torch.zeros(16, dtype=torch.int32, device="meta")
    positions = torch.zeros(16, dtype=torch.int64, device="meta")
    kv_heads = TORCH_ATTENTION.get(config.model_type)
    flat = _Flat(model, None if kv_heads is None else getattr(config, kv_heads))
    with naming_the_module(model):
        repeats = find_repeats(layers, lambda: flat(ids, positions))
        with torch.no_grad(), without_repeats(layers, repeats):
            program = torch.export.export(
                flat, (ids, positions), dynamic_shapes=({0: tokens}, {0: tokens}), strict=False
            )
        split_complex(program.graph)
        replace_writes(program.graph)
        name_group_limits(program.graph)
        expand_repeats(program, layers, dict(flat.named_parameters(remove_duplicate=False)))
    _check_attention(program, config)
    return TracedModel(program, config, shapes, aliases, weight_conversions(model), long)


def _build(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model on meta tensors, with our attention."""
    calls_torch = config.model_type in TORCH_ATTENTION
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation="sdpa" if calls_torch else ATTENTION,
                experts_implementation=EXPERTS,
                dtype=dtype,
            ).eval()
    except Exception as error:  # transformers raises whatever its models do
        if isinstance(error, KeyError) and error.args == (ATTENTION,):
            raise UnsupportedError(f"{config.model_type}: {OWN_CODE}; {SUPPORTED}") from error
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UnsupportedError(f"{config.model_type}: transformers cannot build the model ({what})") from error
    adopt_buffers(model)
    if calls_torch:
        # The body makes the mask, and for our attention makes none; the layers keep the configuration as it was.
        model.base_model.config = copy.deepcopy(model.config)
        model.base_model.config._attn_implementation = ATTENTION
    return model


def _check_attention(program: torch.export.ExportedProgram, config: Any) -> None:
    """Each layer has attention that came in as one operator; UnsupportedError names those that do not."""
    ours = torch.ops.vllm_compile.causal_attention.default
    seen = {node.args[3] for node in program.graph.nodes if node.target is ours}
    if other := sorted(set(range(config.num_hidden_layers)) - seen):
        raise UnsupportedError(f"{config.model_type}: layers {', '.join(map(str, other))}: {OWN_CODE}; {SUPPORTED}")


def decoder_layers(model: nn.Module, config: Any) -> nn.ModuleList:
    """The list of `num_hidden_layers` modules in a model; UnsupportedError unless there is just one."""
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
    if len(found) != 1:
        raise UnsupportedError(f"{type(model).__name__}: found {len(found)} lists of decoder layers, expected one")
    return found[0]


def adopt_buffers(model: PreTrainedModel) -> None:
    """Make the buffers that checkpoints hold parameters, in float32 where transformers keeps them so."""
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name not in module._non_persistent_buffers_set:
                delattr(module, name)
                value = buffer.float() if name in wide else buffer
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def materialise_buffers(model: PreTrainedModel) -> None:
    """Give the buffers that hold constants (RoPE frequencies) their values; parameters stay on meta."""
    for module in model.modules():
        meta = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in meta.items():
            module._buffers[name] = torch.zeros_like(buffer, device="cpu")
        if meta:
            model._init_weights(module)


def long_sequences(model: PreTrainedModel) -> LongSequences:
    """The frequencies that transformers gives RoPE of type longrope beyond the length the model was trained for."""
    positions = long_positions(model.config)
    buffers = {}
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        for layer, kind in (kinds if isinstance(kinds, dict) else {None: kinds}).items():
            if positions and kind == "longrope":
                frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, seq_len=positions, layer_type=layer)
                buffers[f"model.{name}.{'' if layer is None else f'{layer}_'}inv_freq"] = frequencies
    return LongSequences(positions, buffers)


def settle_rope(model: nn.Module) -> None:
    """Keep the angles of RoPE as they are for sequences of the length that the model was trained for."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            vars(module)["rope_type"] = {layer: _settled(kind) for layer, kind in kinds.items()}
        elif isinstance(kinds, str):
            vars(module)["rope_type"] = _settled(kinds)


def _settled(kind: str) -> str:
    return "default" if kind in GROWING_ROPE else kind


def parameter_aliases(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Parameter name -> all names it may have in a checkpoint.

    Tied weights have several; a checkpoint may leave out the name of the model's body (GPT-2's do).
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    body = f"{model.base_model_prefix}."
    aliases: dict[str, tuple[str, ...]] = {}
    for group in names.values():
        short = [name.removeprefix(body) for name in group]
        aliases |= dict.fromkeys(group, tuple(dict.fromkeys([*group, *short])))
    return aliases
