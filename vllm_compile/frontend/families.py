"""What a model's graph does not show: the few facts about families that are read from the configuration.

Whatever is not named here is tried: a family works if its operators do.
"""

from __future__ import annotations

from typing import Any

from vllm_compile.errors import UnsupportedError

SUPPORTED = "decoder-only Transformers with causal softmax attention in every layer are supported (docs/models.md)"
ROPE_TYPES = frozenset({"default", "dynamic", "linear", "llama3", "longrope", "yarn"})
# Types of RoPE whose angles change where a sequence outgrows the length that the model was trained for.  A compiled
# model serves sequences up to there, `max_positions`, so that they depend on the position alone, as all others do; and
# with longrope longer ones with other angles from the start, `long_positions`.
GROWING_ROPE = frozenset({"dynamic", "longrope"})
# Kinds of layers, as transformers calls them in `layer_types`, that are attention to a paged cache.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
OWN_CODE = "attention by code of the model's own is not supported yet"
# Families with such code that cannot even be traced, or whose error would not say so.
OWN_ATTENTION = frozenset({"bloom", "codegen", "ctrl", "gptj", "mpt", "openai-gpt", "xlnet"})
# Families whose code calls torch's scaled_dot_product_attention itself, with the option that holds how many heads
# of keys and values it really has: the code may repeat them for all heads of queries.
TORCH_ATTENTION = {"falcon": "num_kv_heads"}
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
    if getattr(config, "vision_config", None) is not None or hasattr(config, "num_channels"):
        return "models with vision are not supported"
    if any(word in kind for word in STATE_SPACE):
        return "state-space models are not supported"
    if kind in OWN_ATTENTION:
        return OWN_CODE
    if getattr(config, "alibi", False):
        return "ALiBi position biases are not supported"
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    if other:
        return f"layers of type {', '.join(sorted(other))} are not supported"
    if getattr(config, "attention_chunk_size", None):
        return "chunked attention is not supported"
    kinds = {str(p["rope_type"]) for p in _rope_parameters(getattr(config, "rope_parameters", None))}
    unknown = sorted(kinds - ROPE_TYPES)
    if unknown:
        return f"RoPE of type {', '.join(unknown)} is not supported ({', '.join(sorted(ROPE_TYPES))} are)"
    return None


def max_positions(config: Any) -> int:
    """Positions that are served are below this: with RoPE of type longrope, those that its short factors are for."""
    every = _rope_parameters(getattr(config, "rope_parameters", None))
    trained = [p["original_max_position_embeddings"] for p in every if p.get("rope_type") == "longrope"]
    return min([config.max_position_embeddings, *trained])


def long_positions(config: Any) -> int:
    """Positions of sequences that may outgrow `max_positions`, for longrope's long factors; 0 for other types."""
    return config.max_position_embeddings if config.max_position_embeddings > max_positions(config) else 0


def _rope_parameters(parameters: Any) -> list[dict[str, Any]]:
    """The parameters of each RoPE in use: of one, or of one for each type of layer."""
    if not isinstance(parameters, dict):
        return []
    if "rope_type" in parameters:
        return [parameters]
    return [found for inner in parameters.values() for found in _rope_parameters(inner)]
