"""A random Llama small enough to test with, and the artifact's directory around it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = "the quick brown fox jumps over the lazy dog, 0123456789 times a day. "


def save_model(directory: Path, seed: int, dtype: str = "float32") -> LlamaForCausalLM:
    """Two layers, grouped heads, and weights so large that all of them show."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, **special).save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
        dtype=dtype,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    model.save_pretrained(directory)
    return model


def as_artifact(source: Path, directory: Path, **changes: object) -> Path:
    """Copies a model's directory and names our architecture in its config.json, as the compiler does."""
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["VllmCompileForCausalLM"], "vllm_compile": {"schema": 1}, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def save_artifact(folder: Path, seed: int) -> Path:
    """Of a model that is saved beside it, in a new folder."""
    save_model(folder / "source", seed)
    return as_artifact(folder / "source", folder / "artifact")
