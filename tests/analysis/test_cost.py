"""Costs against counts made in other ways: torch's FLOP counter, masks written out, parameters of the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests import models
from tests.analysis.conftest import SIZES
from vllm_compile.analysis import cost
from vllm_compile.analysis.cost import COSTS, Cost, Workload, step_cost
from vllm_compile.analysis.graph import Call, calls
from vllm_compile.analysis.kernels import Chooser, Kernel, library
from vllm_compile.analysis.roofline import predict
from vllm_compile.driver import fuse_model
from vllm_compile.errors import UnsupportedError
from vllm_compile.lossless import Lossless
from vllm_compile.ops.paged_attention import unseen
from vllm_compile.relax_passes.pipeline import run_passes
from vllm_compile.schedules.lossless_panels import LosslessPanels
from vllm_compile.spec import OpSpec, Sym, TensorSpec
from vllm_compile.targets import resolve
from vllm_compile.targets.cuda import H200

TOKENS = 24


@pytest.fixture(scope="module")
def stages(pairs) -> dict[str, list[Call]]:
    """The operators of a small Llama behind each pass."""
    found = {}
    run_passes(pairs("two layers").imported.module, lambda name, module: found.setdefault(name, calls(module)))
    return found


def total(of: list[Call], workload: Workload) -> Cost:
    return sum((step_cost(call, workload) * call.times for call in of if not call.once), Cost())


def test_products_are_those_that_torch_counts(pairs, stages):
    """Hugging Face's model on one prompt; its attention multiplies the masked half too."""
    model = pairs("two layers").model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, TOKENS, dtype=torch.int64))
    counted = counter.get_flop_counts()["Global"]
    scores = [c for c in stages["page_kv_cache"] if c.op == "paged_attention"]
    rest = [c for c in stages["page_kv_cache"] if c.op != "paged_attention"]
    assert total(rest, Workload(1, TOKENS, 0)).matrix_flops == counted[torch.ops.aten.mm]
    whole = TOKENS * TOKENS / Workload(1, TOKENS, 0).pairs()
    assert total(scores, Workload(1, TOKENS, 0)).matrix_flops * whole == counted[torch.ops.aten.bmm]


def test_passes_keep_the_products(stages):
    """Fusing changes what is moved, not what is multiplied."""
    workload = Workload(3, 1, 17)
    flops = {name: total(of, workload).matrix_flops for name, of in stages.items()}
    assert len(set(flops.values())) == 1, flops
    assert (
        total(stages["fuse_elementwise"], workload).activation_bytes
        < total(stages["page_kv_cache"], workload).activation_bytes
    )


def test_a_step_reads_every_parameter_once(pairs, stages):
    """All but the embedding, of which it reads its tokens' rows; and the rows of RoPE's tables."""
    model = pairs("two layers").model
    embedding = model.model.embed_tokens.weight
    read = (
        sum(p.numel() for p in model.parameters()) - embedding.numel() + embedding.shape[1] + 2 * model.config.head_dim
    )
    assert total(stages["fuse_elementwise"], Workload(1, 1, 5)).weight_bytes == 4 * read


def test_kv_bytes(pairs, stages):
    """Reads what is cached and this step's, writes this step's: keys and values of every layer."""
    config = pairs("two layers").model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert total(stages["fuse_elementwise"], Workload(3, 1, 17)).kv_bytes == 3 * (18 + 1) * token
    assert total(stages["fuse_elementwise"], Workload(2, 9, 4)).kv_bytes == 2 * (13 + 9) * token


@given(st.integers(1, 3), st.integers(1, 12), st.integers(0, 12), st.integers(0, 30))
def test_pairs_and_reads_are_those_of_the_mask(requests, queries, cached, window):
    workload = Workload(requests, queries, cached)
    position = torch.arange(cached, cached + queries)
    seen = ~unseen(position, torch.arange(cached + queries), window)
    assert workload.pairs(window) == requests * int(seen.sum())
    assert workload.read(window) == requests * int(seen.any(0).sum())


def test_weights_count_as_they_are_stored():
    x, weight = TensorSpec((Sym.TOKENS, 128), "bfloat16"), TensorSpec((64, 128), "bfloat16")
    spec = OpSpec("linear", (("x", x), ("weight", weight)), (TensorSpec((Sym.TOKENS, 64), "bfloat16"),))
    call = Call("layer_0", spec, {"weight": "w"}, {}, 1, False)
    plain, packed = (step_cost(call, Workload(1, 1, 0), layouts) for layouts in ({}, {"weight": Lossless()}))
    assert plain == Cost(2 * 64 * 128, 0, 2 * 64 * 128, 0, 2 * (64 + 128))
    assert packed.weight_bytes == Lossless().shape((64, 128))[0] < plain.weight_bytes
    assert (packed.matrix_flops, packed.activation_bytes) == (plain.matrix_flops, plain.activation_bytes)
    assert (plain.unpack_flops, packed.unpack_flops) == (0, 0)
    on_cpu = step_cost(call, Workload(1, 1, 0), {"weight": LosslessPanels(16)})
    assert on_cpu.unpack_flops == 64 * 128 * 21 / 4
    for vector, seconds in ((1e12, on_cpu.bytes / 1e9), (1e9, on_cpu.unpack_flops / 1e9)):
        chip = replace(H200, sustained_bandwidth=1e9, vector=vector)
        assert predict(Kernel(on_cpu), "bfloat16", chip).memory == pytest.approx(seconds)


def test_experts_that_nobody_chose_are_not_read():
    """Two of eight experts a token; one token reads two, two read 3.5 on average, very many all eight."""
    x, routed = TensorSpec((Sym.TOKENS, 64), "bfloat16"), TensorSpec((Sym.TOKENS, 2), "int32")
    weight = TensorSpec((8, 96, 64), "bfloat16")
    inputs = (("x", x), *((name, routed) for name in ("experts", "order", "ends")), ("weight", weight))
    spec = OpSpec("expert_gate_up_silu", inputs, (TensorSpec((Sym.TOKENS, 2, 48), "bfloat16"),))
    call = Call("layer_0", spec, {"weight": "experts"}, {}, 1, False)
    expert = 96 * 64 * 2
    for tokens, experts in ((1, 2), (2, 3.5), (1000, 8)):
        found = step_cost(call, Workload(1, tokens, 0))
        assert found.weight_bytes == expert * experts
        assert found.matrix_flops == 2 * tokens * 2 * 96 * 64
        assert found.vector_flops == tokens * 2 * 3 * 48
        assert found.activation_bytes == tokens * 2 * (64 + 3 * 2 * 2 + 2 * 48)


def test_a_library_takes_over_where_the_compiler_says():
    """In large batches gates and ups go through memory, and weights are read plain."""
    module, _ = fuse_model(models.config(**SIZES), "bfloat16")
    gated = next(call for call in calls(module) if call.op == "gate_up_silu")
    chooser = Chooser(resolve("cuda"))
    small, large = (chooser.compiled(gated, Workload(1, tokens, 0)) for tokens in (1, 4096))
    assert [kernel.library for kernel in small] == [False]
    assert [kernel.library for kernel in large] == [True, False]
    assert [k.cost for k in large] == [k.cost for k in library(gated, Workload(1, 4096, 0))]
    once = step_cost(gated, Workload(1, 4096, 0))
    between = 4096 * 2 * SIZES["intermediate_size"] * 2
    assert sum((kernel.cost for kernel in large), Cost()) == once + Cost(activation_bytes=2 * between)


def test_what_takes_over_may_be_ours():
    """FlashAttention for prompts, within a window another kernel of ours."""
    module, _ = fuse_model(models.config(**SIZES), "bfloat16")
    call = next(call for call in calls(module) if call.op == "paged_attention")
    attributes = tuple(sorted((*call.spec.attributes, ("window", 8))))
    within = replace(call, spec=replace(call.spec, attributes=attributes, options=frozenset({"window"})))
    for attention, found in ((call, [True]), (within, [False])):
        kernels = Chooser(resolve("cuda")).compiled(attention, Workload(1, 64, 0))
        assert [kernel.library for kernel in kernels] == found


def test_an_operator_without_a_cost_is_named(stages, monkeypatch):
    monkeypatch.setattr(cost, "COSTS", {name: how for name, how in COSTS.items() if name != "add_rms_norm"})
    with pytest.raises(UnsupportedError, match=r"what operator add_rms_norm costs; add it to analysis/cost\.py"):
        total(stages["fuse_elementwise"], Workload(1, 1, 0))
