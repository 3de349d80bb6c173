"""Families of models, each a small random one of its real configuration: the same tokens as Hugging Face.

Prompts are longer than the sliding windows; several requests are prefilled and decoded together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import vllm_compile
from tests.conftest import SEED
from vllm_compile import driver
from vllm_compile.accuracy import relative_error
from vllm_compile.driver import CompileOptions, compile_model
from vllm_compile.errors import UnsupportedError
from vllm_compile.frontend.hf import read_config, trace
from vllm_compile.frontend.importer import import_model
from vllm_compile.lowering import lower
from vllm_compile.paged_batch import PagedBatch
from vllm_compile.quick_verification import not_run
from vllm_compile.relax_passes.pipeline import run_passes
from vllm_compile.schedules.cpu import gate_up, linear
from vllm_compile.schedules.select import choose
from vllm_compile.targets import cuda
from vllm_compile.verify import verify

pytestmark = pytest.mark.slow

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


def continued(model: PreTrainedModel, ids: torch.Tensor) -> list[int]:
    """Hugging Face's greedy continuation."""
    text = ids[None]
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = model(input_ids=text, use_cache=False).logits
        text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
    return text[0, len(ids) :].tolist()


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


@pytest.fixture(scope="module", autouse=True)
def _few_kernels():
    """One tile per matrix product, which makes compiling twice as fast; tests/schedules has the others."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (linear, gate_up):
            original = module.default_variants
            patch.setattr(module, "default_variants", lambda *args, f=original, **options: f(*args, **options)[:1])
        yield


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """`artifacts(family, dtype)`: the compiled model, not verified, which the tests do."""

    @cache
    def compiled(family: str, dtype: str = "float32") -> Path:
        directory = tmp_path_factory.mktemp("family")
        random_model(family).save_pretrained(directory / "model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "quick_verification", lambda *_: not_run("tests do"))
            return vllm_compile.compile(directory / "model", out=directory / "artifact", dtype=dtype).artifact

    return compiled


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens(family, artifacts):
    model, requests = random_model(family), prompts()
    assert served(artifacts(family), requests) == [continued(model, ids) for ids in requests]


def test_dynamic_rope_within_the_trained_length(artifacts, tmp_path):
    """It starts to change behind `max_position_embeddings`, so that the program is the one without."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    random_model("Mistral", rope_parameters=rope).save_pretrained(tmp_path / "model")
    traced = trace(read_config(tmp_path / "model"), torch.float32)
    tables = import_model(traced, 96).tables
    plain = import_model(trace(random_model("Mistral").config, torch.float32), 96).tables
    assert tables
    assert all(torch.equal(tables[name], plain[name]) for name in plain)


def test_longrope_beyond_what_it_was_trained_for(artifacts):
    """Sequences that may outgrow it are served with the long factors from the start, as vLLM does."""
    artifact = artifacts("Phi-3 longrope")
    program = vllm_compile.load(artifact)
    assert (program.max_positions, program.long_positions) == (96, 384)
    model, requests = random_model("Phi-3 longrope"), prompts(LONG_PROMPTS)
    expected = [continued(model, ids) for ids in requests]
    assert served(artifact, requests, first_position=96) == expected
    short = random_model("Phi-3 longrope", original_max_position_embeddings=200)  # negative control: they matter
    assert [continued(short, ids) for ids in requests] != expected


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "Phi-3 longrope"])  # its kernels are Phi-3's
def test_bfloat16(family, artifacts):
    """Against float32 no more than 1.1x the error of Hugging Face's bfloat16."""
    artifact = artifacts(family, "bfloat16")
    report = verify(artifact, artifact.with_name("model"), quick=True)
    assert report.passed, report


@pytest.mark.parametrize("family", ["Mixtral", "Qwen 3 MoE"])
def test_bfloat16_sees_one_expert_without_weights(family, artifacts, tmp_path):
    """Negative control: what only some of the tokens meet."""
    model, artifact = random_model(family), artifacts(family, "bfloat16")
    experts = [weight for name, weight in model.named_parameters() if "layers.0" in name and "experts.down" in name]
    experts[0].data[-1].zero_()
    model.save_pretrained(tmp_path)
    assert not verify(artifact, tmp_path, quick=True).passed


def test_bfloat16_sees_one_layer_without_bias(artifacts, tmp_path):
    """Negative control: the error of a model that differs a little is above what rounding explains."""
    model = random_model("StableLM")
    model.model.layers[0].self_attn.v_proj.bias.data.zero_()
    model.save_pretrained(tmp_path)
    assert not verify(artifacts("StableLM", "bfloat16"), tmp_path, quick=True).passed


def logits_error(artifact: Path, model: PreTrainedModel) -> float:
    """Of our logits for the longest prompt, against a model's."""
    ids, program = prompts()[0], vllm_compile.load(artifact)
    batch = PagedBatch(program.plan.model, [len(ids)])
    step = batch.step([0], [len(ids)])
    ours = program.logits(program(ids.int(), step.pop("positions"), batch.kv, **step))
    with torch.no_grad():
        return relative_error(ours, model(input_ids=ids[None], use_cache=False).logits[0])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("DeepSeek-V3", {"topk_group": 3}),
        ("DeepSeek-V2-Lite", {"routed_scaling_factor": 1.6}),
        ("Mistral", {"sliding_window": WINDOW + 1}),
        ("Gemma 2", {"attn_logit_softcapping": 5.0}),
        ("Gemma 3", {"rope_parameters": ROPES | {"sliding_attention": ROPES["full_attention"]}}),
        ("Falcon 2", {"num_kv_heads": 2, "layer_norm_epsilon": 0.1}),
        ("Mixtral", {"num_experts_per_tok": 1}),
        ("Phi-3 longrope", {"original_max_position_embeddings": 48}),
        ("StableLM", None),
    ],
)
def test_a_small_difference_is_noticed(family, changes, artifacts):
    """Negative control: a model that differs in what the family adds to Llama."""
    model = random_model(family, **changes or {})
    if changes is None:
        model.model.layers[0].self_attn.v_proj.bias.data.zero_()
    assert logits_error(artifacts(family), random_model(family)) < 1e-5
    assert logits_error(artifacts(family), model) > 1e-3


def test_layers_of_two_kinds_are_two_functions():
    """However many layers there are."""
    model = random_model("Gemma 2", num_hidden_layers=4, layer_types=LAYERS * 2)
    imported = import_model(trace(model.config, torch.float32), 96)
    module, _ = run_passes(imported.module)
    names = {var.name_hint for var in module.get_global_vars()}
    assert {name for name in names if name.startswith("layer_")} == {"layer_0", "layer_1"}


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("Mistral", {}, "window=24"),
        ("Gemma 2", {"head_dim": 128}, "soft_cap=50.0"),
        ("Mixtral", {"head_dim": 128, "num_local_experts": 16}, "route"),
    ],
)
def test_cuda_refuses_what_it_cannot_serve(family, changes, what, tmp_path):
    """By name, with the layers, before any kernel is built."""
    random_model(family, **changes).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match=f"decoder layer 0.*: target cuda has no kernel for .*{what}"):
        compile_model(tmp_path / "model", "cuda", tmp_path / "artifact", CompileOptions())
    assert not (tmp_path / "artifact").exists()


WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": 160}


@pytest.mark.parametrize(
    ("family", "changes"), [("Cohere", {}), ("GPT-2", {"n_embd": 128, "n_inner": 192}), ("Qwen 3", {})]
)
def test_cuda_has_kernels(family, changes):
    """For every operator that Llama has not."""
    model = random_model(family, **WIDE | changes)
    imported = import_model(trace(model.config, torch.bfloat16), 96)
    module, _ = run_passes(imported.module)
    target = cuda.for_chip()
    chosen = lower(module, lambda spec: choose(spec, target)).kernels
    assert "elementwise" in {spec.op for spec in chosen}
