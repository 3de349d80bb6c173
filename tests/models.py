"""Small random Llamas of many kinds, as Hugging Face has them and as we import them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DeepseekV2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from vllm_compile.frontend.hf import parameter_aliases, trace
from vllm_compile.frontend.importer import ImportedModel, import_model

MAX_POSITIONS = 64
KINDS: dict[str, dict] = {
    "one layer": {"num_hidden_layers": 1},
    "two layers": {},
    "five layers": {"num_hidden_layers": 5},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "bfloat16": {"dtype": "bfloat16"},
    "wide heads": {"head_dim": 32},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def config(**changes) -> LlamaConfig:
    """Two layers, grouped heads; `changes` are fields of LlamaConfig."""
    sizes = {
        "vocab_size": 80,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        # so large that every piece of the model shows in its logits
        "initializer_range": 0.3,
        "dtype": "float32",
    }
    return LlamaConfig(**sizes | changes)


@dataclass(frozen=True)
class Pair:
    """A model in Hugging Face and the same in Relax."""

    model: LlamaForCausalLM
    imported: ImportedModel

    def weights(self) -> dict[str, torch.Tensor]:
        """What each parameter of the module's `main` is given, behind input_ids and positions."""
        aliases = parameter_aliases(self.model)
        parameters = dict(self.model.named_parameters())
        named = {
            relax_name: parameters[next(n for n in aliases[name] if n in parameters)].detach()
            for relax_name, name in self.imported.weights.items()
        }
        return named | self.imported.tables

    def arguments(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Arguments of `main` for one prompt."""
        weights = self.weights()
        _, _, *parameters = self.imported.module["main"].params
        return [ids, torch.arange(len(ids)), *(weights[p.name] for p in parameters)]


def group_router() -> DeepseekV2TopkRouter:
    """DeepSeek-V2's: of hidden states [T, 32], three of twelve experts, in two of four groups."""
    config = DeepseekV2Config(
        hidden_size=32,
        n_routed_experts=12,
        num_experts_per_tok=3,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
    )
    return DeepseekV2TopkRouter(config)


def llama(seed: int, **changes) -> LlamaForCausalLM:
    """A random model, norm weights and biases too."""
    settings = config(**changes)
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(settings, attn_implementation="eager", dtype=settings.dtype).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(mean=1.0, std=0.3)
    return model


def pair(seed: int, **changes) -> Pair:
    """A random model and its import."""
    model = llama(seed, **changes)
    settings = model.config
    traced = trace(config(**changes), settings.dtype)  # a copy: tracing sets its attention
    return Pair(model, import_model(traced, MAX_POSITIONS))


def save(directory: Path, seed: int, **changes) -> LlamaForCausalLM:
    """A random Llama as a Hugging Face directory, with a tokenizer and in two shards.

    Its weights are small enough that bfloat16 errs alike on all tokens, not on a few by chance.
    """
    sizes = {"hidden_size": 64, "max_position_embeddings": 256, "initializer_range": 0.1}
    model = llama(seed, **sizes | changes)
    model.save_pretrained(directory, max_shard_size="150KB")
    words = {f"word{i}": i for i in range(model.config.vocab_size)}
    Tokenizer(WordLevel(words, unk_token="word0")).save(str(directory / "tokenizer.json"))
    return model
