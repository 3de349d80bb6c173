"""Families of models, each a small random one of its real configuration: the same tokens as Hugging Face.

Prompts are longer than the sliding windows; several requests are prefilled and decoded together.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import vllm_compile
from tests.families import (
    FAMILIES,
    LAYERS,
    LONG_PROMPTS,
    ROPES,
    WIDE,
    WINDOW,
    continued,
    prompts,
    random_model,
    served,
)
from tests.greedy import same_tokens
from vllm_compile.accuracy import relative_error
from vllm_compile.driver import CompileOptions, compile_model
from vllm_compile.errors import UnsupportedError
from vllm_compile.frontend.hf import read_config, trace
from vllm_compile.frontend.importer import import_model
from vllm_compile.lowering import lower
from vllm_compile.paged_batch import PagedBatch
from vllm_compile.relax_passes.pipeline import run_passes
from vllm_compile.schedules.select import choose
from vllm_compile.targets import cuda
from vllm_compile.verify import verify

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens(family, family_artifact):
    model, requests = random_model(family), prompts()
    assert same_tokens(served(family_artifact(family), requests), [continued(model, ids) for ids in requests])


def test_dynamic_rope_within_the_trained_length(tmp_path):
    """It starts to change behind `max_position_embeddings`, so that the program is the one without."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    random_model("Mistral", rope_parameters=rope).save_pretrained(tmp_path / "model")
    traced = trace(read_config(tmp_path / "model"), torch.float32)
    tables = import_model(traced, 96).tables
    plain = import_model(trace(random_model("Mistral").config, torch.float32), 96).tables
    assert tables
    assert all(torch.equal(tables[name], plain[name]) for name in plain)


@pytest.mark.parametrize("family", ["Phi-3 longrope"])
def test_longrope_beyond_what_it_was_trained_for(family, family_artifact):
    """Sequences that may outgrow it are served with the long factors from the start, as vLLM does."""
    artifact = family_artifact(family)
    program = vllm_compile.load(artifact)
    assert (program.max_positions, program.long_positions) == (96, 384)
    model, requests = random_model(family), prompts(LONG_PROMPTS)
    assert same_tokens(served(artifact, requests, first_position=96), [continued(model, ids) for ids in requests])
    short = random_model(family, original_max_position_embeddings=200)  # negative control: they matter
    with torch.no_grad():
        for ids in requests:
            assert relative_error(short(ids[None]).logits, model(ids[None]).logits) > 1e-2


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "Phi-3 longrope"])  # its kernels are Phi-3's
def test_bfloat16(family, family_artifact):
    """Against float32 no more than 1.1x the error of Hugging Face's bfloat16."""
    artifact = family_artifact(family, "bfloat16")
    report = verify(artifact, artifact.with_name("model"))
    assert report.passed, report


@pytest.mark.parametrize("family", ["Mixtral", "Qwen 3 MoE"])
def test_bfloat16_sees_one_expert_without_weights(family, family_artifact, tmp_path):
    """Negative control: what only some of the tokens meet."""
    model, artifact = random_model(family), family_artifact(family, "bfloat16")
    experts = [weight for name, weight in model.named_parameters() if "layers.0" in name and "experts.down" in name]
    experts[0].data[-1].zero_()
    model.save_pretrained(tmp_path)
    assert not verify(artifact, tmp_path, quick=True).passed


@pytest.mark.parametrize("family", ["StableLM"])
def test_bfloat16_sees_one_layer_without_bias(family, family_artifact, tmp_path):
    """Negative control: the error of a model that differs a little is above what rounding explains."""
    model = random_model(family)
    model.model.layers[0].self_attn.v_proj.bias.data.zero_()
    model.save_pretrained(tmp_path)
    assert not verify(family_artifact(family, "bfloat16"), tmp_path, quick=True).passed


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
def test_a_small_difference_is_noticed(family, changes, family_artifact):
    """Negative control: a model that differs in what the family adds to Llama."""
    model = random_model(family, **changes or {})
    if changes is None:
        model.model.layers[0].self_attn.v_proj.bias.data.zero_()
    assert logits_error(family_artifact(family), random_model(family)) < 1e-5
    assert logits_error(family_artifact(family), model) > 1e-3


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
        ("Mixtral", WIDE | {"intermediate_size": 200}, "expert_gate_up_silu"),
        ("DeepSeek-V2-Lite", WIDE, "head_linear"),
    ],
)
def test_cuda_refuses_what_it_cannot_serve(family, changes, what, tmp_path):
    """By name, with the layers, before any kernel is built."""
    random_model(family, **changes).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match=f"decoder layer 0.*: target cuda has no kernel for .*{what}"):
        compile_model(tmp_path / "model", "cuda", tmp_path / "artifact", CompileOptions())
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Cohere", {}),
        ("GPT-2", {"n_embd": 128, "n_inner": 192}),
        ("Qwen 3", {}),
        ("Mistral", {}),
        ("Gemma 2", {}),
        ("Gemma 3", {}),
        ("Mixtral", {}),
        ("Qwen 3 MoE", {"moe_intermediate_size": 64}),
    ],
)
def test_cuda_has_kernels(family, changes):
    """For every operator, and every option of it, that Llama has not."""
    model = random_model(family, **WIDE | changes)
    imported = import_model(trace(model.config, torch.bfloat16), 96)
    module, _ = run_passes(imported.module)
    target = cuda.for_chip()
    chosen = lower(module, lambda spec: choose(spec, target)).kernels
    assert any(spec.op == "elementwise" or spec.options for spec in chosen)
