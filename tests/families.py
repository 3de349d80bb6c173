"""Families of models, each a small random one of its real configuration, and how they are run here and there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import vllm_compile
from tests.conftest import SEED
from tests.greedy import Tokens, decided
from vllm_compile.paged_batch import PagedBatch
from vllm_compile.quick_verification import not_run
from vllm_compile.schedules.cpu import gate_up, linear

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
}
WINDOW = 24
WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": 160}  # shapes that CUDA serves
LAYERS = ["sliding_attention", "full_attention"]
ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 24,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}
FAMILIES: dict[str, tuple[str, dict]] = {
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "DeepSeek-V3": ("deepseek_v3", DEEPSEEK | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2}),
    "DeepSeek-V2-Lite": ("deepseek_v2", DEEPSEEK | {"q_lora_rank": None, "topk_method": "greedy"}),
    "Falcon": ("falcon", {"multi_query": True, "parallel_attn": True, "bias": False, "alibi": False}),
    "Falcon 2": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "parallel_attn": True, "bias": False, "alibi": False},
    ),
    "Gemma": ("gemma", {"head_dim": 16}),
    "Gemma 2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}),
    "Gemma 3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": LAYERS,
            "rope_parameters": ROPES,
        },
    ),
    "GPT-2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 160, "n_positions": 96}),
    "GPT-NeoX": ("gpt_neox", SIZES),
    "Granite": (
        "granite",
        {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "Mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "Mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "OLMo 2": ("olmo2", {}),
    "OPT": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "Phi-3": ("phi3", {"sliding_window": WINDOW}),
    "Phi-3 longrope": (
        "phi3",
        {
            "max_position_embeddings": 384,
            "original_max_position_embeddings": 96,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
                "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
            },
        },
    ),
    "Phi-4-mini": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "Qwen 2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "Qwen 3": ("qwen3", {"head_dim": 32}),
    "Qwen 3 MoE": (
        "qwen3_moe",
        {
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "SmolLM 3": ("smollm3", {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}),
    "StableLM": ("stablelm", {"use_qkv_bias": True}),
    "StarCoder 2": ("starcoder2", {"sliding_window": WINDOW}),
}
PROMPTS, NEW_TOKENS = (55, 31, 1), 6
LONG_PROMPTS = (97, 150)  # longer than the tests' longrope is trained for


def random_model(family: str, **changes) -> PreTrainedModel:
    """Its weights are so large that all of it shows; norm weights and biases, of routers too, are random as well."""
    kind, options = FAMILIES[family]
    config = AutoConfig.for_model(kind, **SIZES | options | changes)
    for name in ("initializer_range", "init_std"):
        if hasattr(config, name):
            setattr(config, name, 0.15)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    for tensor in model.state_dict().values():
        if tensor.ndim == 1:
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return model


def prompts(lengths: Sequence[int] = PROMPTS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(3, 160, (length,), generator=generator) for length in lengths]


def continued(model: PreTrainedModel, ids: torch.Tensor) -> Tokens:
    """Hugging Face's greedy continuation, as far as it is decided."""
    text, rows = ids[None], []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            rows.append(model(input_ids=text, use_cache=False).logits[0, -1])
        text = torch.cat([text, rows[-1].argmax().view(1, 1)], dim=1)
    return decided(torch.stack(rows))


def served(artifact: Path, requests: Sequence[torch.Tensor], first_position: int = 0) -> list[list[int]]:
    """Ours: one prefill of all requests, then one token each at a time."""
    program = vllm_compile.load(artifact)
    lengths = [len(ids) for ids in requests]
    batch = PagedBatch(program.plan.model, [length + NEW_TOKENS for length in lengths])

    def step(ids, begin, end):
        arguments = batch.step(begin, end)
        return program(ids.int(), arguments.pop("positions") + first_position, batch.kv, **arguments)

    hidden = step(torch.cat(list(requests)), [0] * len(lengths), lengths)
    ids = program.logits(hidden[torch.tensor(lengths).cumsum(0) - 1]).argmax(-1)
    tokens = [ids]
    for count in range(NEW_TOKENS - 1):
        begin = [length + count for length in lengths]
        ids = program.logits(step(ids, begin, [at + 1 for at in begin])).argmax(-1)
        tokens.append(ids)
    return torch.stack(tokens, dim=1).tolist()


@contextmanager
def few_kernels() -> Iterator[None]:
    """One tile per matrix product, which makes compiling twice as fast; tests/schedules has the others."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (linear, gate_up):
            original = module.default_variants
            patch.setattr(module, "default_variants", lambda *args, f=original, **options: f(*args, **options)[:1])
        yield


def compile_family(family: str, dtype: str, directory: Path) -> None:
    """`directory/model` and its `directory/artifact`, not verified, which the tests do."""
    random_model(family).save_pretrained(directory / "model")
    with pytest.MonkeyPatch.context() as patch, few_kernels():
        patch.setattr("vllm_compile.quick_verification.quick_verification", lambda *_: not_run("tests do"))
        vllm_compile.compile(directory / "model", out=directory / "artifact", dtype=dtype)
