"""What a model's graph does not show: the few facts about families that are read from the configuration.

Whatever is not named here is tried: a family works if its operators do.
"""

from __future__ import annotations

from typing import Any

from vllm_compile.errors import UnsupportedError

SUPPORTED = "decoder-only Transformers with causal softmax attention in every layer are supported (docs/models.md)"
# RoPE whose angles depend on the position alone.  `dynamic` and `longrope` also depend on the sequence's length.
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
# Kinds of layers, as transformers calls them in `layer_types`, that are attention to a paged cache.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Families that compute attention by code of their own, which does not come in as one operator.
OWN_ATTENTION = frozenset({"bloom", "codegen", "ctrl", "falcon", "gptj", "mpt", "openai-gpt", "xlnet"})
# Names in checkpoints that transformers has renamed since: by kind of model, new -> old start of a name.
OLDER_NAMES = {"gpt_neox": ("lm_head.", "embed_out.")}
STATE_SPACE = ("mamba", "rwkv", "recurrent_gemma", "xlstm")


def check_family(config: Any) -> None:
    """Refuse what cannot be compiled, by name, before anything is traced.

    Raises:
        UnsupportedError: with the reason, and what is supported.
    """
    named = (getattr(config, "architectures", None) or [config.model_type])[0]
    if reason := _refusal(config):
        raise UnsupportedError(f"{named}: {reason}; {SUPPORTED}")


def _refusal(config: Any) -> str | None:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder models are not supported"
    if getattr(config, "vision_config", None) is not None:
        return "models with vision are not supported"
    if any(word in kind for word in STATE_SPACE):
        return "state-space models are not supported"
    if kind in OWN_ATTENTION:
        return f"{kind} computes attention by code of its own, which is not supported yet"
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other:
        return f"layers of type {', '.join(sorted(other))} are not supported"
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "mixture-of-experts layers are not supported yet"
    if getattr(config, "attention_chunk_size", None):
        return "chunked attention is not supported"
    unknown = sorted(_rope_types(getattr(config, "rope_parameters", None)) - ROPE_TYPES)
    if unknown:
        return f"RoPE of type {', '.join(unknown)} is not supported ({', '.join(sorted(ROPE_TYPES))} are)"
    return None


def _rope_types(parameters: Any) -> set[str]:
    """The types of RoPE in use: one, or one for each type of layer."""
    if not isinstance(parameters, dict):
        return set()
    if "rope_type" in parameters:
        return {str(parameters["rope_type"])}
    return set().union(*(_rope_types(inner) for inner in parameters.values()))


def older_name(config: Any, name: str) -> str:
    """What a parameter is called in checkpoints of the family; mostly the same."""
    new, old = OLDER_NAMES.get(config.model_type, ("", ""))
    return old + name.removeprefix(new) if new and name.startswith(new) else name
