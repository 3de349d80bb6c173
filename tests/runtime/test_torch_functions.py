"""The functions that torch programs call, against the operators' references; batches padded, the cache poisoned."""

from __future__ import annotations

import pytest
import torch

from vllm_compile.errors import TargetError
from vllm_compile.ops import KV_CACHE_WRITE, LINEAR, PAGED_ATTENTION, QKV_ROPE_CACHE
from vllm_compile.runtime import torch_functions, tpc_kernels
from vllm_compile.runtime.buckets import Bucket
from vllm_compile.runtime.padded_steps import Lengths, batches_of, pad, shape_of

BLOCK = 16
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
OPTIONS = pytest.mark.parametrize("options", [{}, {"window": 9}, {"soft_cap": 2.0}], ids=str)


def attend(inputs, attributes, lengths: Lengths, batch, bucket: Bucket) -> torch.Tensor:
    """Rows of q that belong to the batch, attended in a bucket's shape, in the step's order."""
    tokens = inputs["q"].shape[0]
    step = {
        "input_ids": torch.arange(tokens),
        "positions": torch.arange(tokens),
        "slot_mapping": torch.arange(tokens),
        "block_table": inputs["block_table"],
    }
    padded = pad(step, lengths, batch, bucket, BLOCK)
    given = {name: padded.inputs[name] for name in ("block_table", "seq_lens", "query_start_loc")}
    q = inputs["q"][padded.inputs["input_ids"]]
    out = torch_functions.paged_attention(q, inputs["kv"], **given, **attributes)
    assert out.shape == q.shape
    result = torch.full_like(inputs["q"], float("nan"))
    result[padded.places] = out[padded.taken]
    return result


@DTYPES
@OPTIONS
@pytest.mark.parametrize("wider", [0, 3])
def test_paged_attention(dtype, options, wider, generator):
    """Decodes in one batch, prompts one by one and all together, in exact shapes and in larger ones."""
    inputs, attributes = PAGED_ATTENTION.sample(generator, dtype)
    attributes |= options
    expected = PAGED_ATTENTION.reference(**inputs, **attributes)
    lengths = Lengths(inputs["query_start_loc"].diff().tolist(), inputs["seq_lens"].tolist())
    # What no request has cached must not matter, were it not even a number.
    cached = torch.zeros(inputs["kv"].shape[0], BLOCK, dtype=torch.bool)
    for row, length in zip(inputs["block_table"], lengths.cached, strict=True):
        for position in range(length):
            cached[row[position // BLOCK], position % BLOCK] = True
    inputs["kv"].masked_fill_(~cached[:, None, :, None], float("nan"))
    together = batches_of(lengths, together=True)
    apart = batches_of(lengths, together=False)
    assert len(together) == 1
    assert len(apart) == 3, "the two that decode, and two prompts"
    tolerance = PAGED_ATTENTION.tolerance[str(dtype).removeprefix("torch.")]
    atol = tolerance.atol * (3 if dtype is torch.bfloat16 else 1)  # torch rounds scores to bf16, too
    for batch in [*together, *apart]:
        exact = shape_of(batch, lengths, BLOCK)
        more = wider if exact.queries > 1 else 0
        bucket = Bucket(exact.batch + wider, exact.queries + more, exact.blocks + wider)
        result = attend(inputs, attributes, lengths, batch, bucket)
        mine = ~result.isnan().flatten(1).any(1)
        assert int(mine.sum()) == sum(lengths.queries[r] for r in batch)
        torch.testing.assert_close(result[mine], expected[mine], rtol=tolerance.rtol, atol=atol)


def test_attention_sees_a_missing_block(generator):
    """Negative control: a row of the table that is someone else's."""
    inputs, attributes = PAGED_ATTENTION.sample(generator, torch.float32)
    expected = PAGED_ATTENTION.reference(**inputs, **attributes)
    lengths = Lengths(inputs["query_start_loc"].diff().tolist(), inputs["seq_lens"].tolist())
    (batch, *_) = batches_of(lengths, together=False)
    inputs["block_table"][1, 0] = inputs["block_table"][3, 0]
    result = attend(inputs, attributes, lengths, batch, shape_of(batch, lengths, BLOCK))
    assert not torch.allclose(result[1], expected[1], rtol=1e-3)


@DTYPES
def test_cache_writes(dtype, generator):
    inputs, attributes = KV_CACHE_WRITE.sample(generator, dtype)
    wanted = inputs["kv"].clone()
    KV_CACHE_WRITE.reference(**{**inputs, "kv": wanted})
    torch_functions.kv_cache_write(**inputs)
    assert torch.equal(inputs["kv"], wanted)
    nobody = {**inputs, "slot_mapping": torch.full_like(inputs["slot_mapping"], -1)}
    torch_functions.kv_cache_write(**nobody)
    assert torch.equal(inputs["kv"], wanted), "without a slot nothing is written"

    rope, attributes = QKV_ROPE_CACHE.sample(generator, dtype)
    wanted = rope["kv"].clone()
    q = QKV_ROPE_CACHE.reference(**{**rope, "kv": wanted}, **attributes)
    heads, kv_heads, head_dim = (attributes[name] for name in ("num_heads", "num_kv_heads", "head_dim"))
    rotated = torch.cat([q, torch.zeros(q.shape[0], kv_heads, head_dim, dtype=dtype)], dim=1)
    written = rope["slot_mapping"] >= 0
    slots = rope["slot_mapping"][written]
    rotated[written, heads:] = wanted[slots // BLOCK, :, slots % BLOCK, :head_dim]
    result = torch_functions.split_and_cache(rotated, rope["qkv"], rope["kv"], rope["slot_mapping"])
    assert torch.equal(result, q)
    assert torch.equal(rope["kv"], wanted)


@DTYPES
@pytest.mark.parametrize("left_out", [(), ("bias",), ("residual",), ("bias", "residual")])
def test_linear(dtype, left_out, generator):
    inputs, _ = LINEAR.sample(generator, dtype)
    inputs = {name: value for name, value in inputs.items() if name not in left_out}
    tolerance = LINEAR.tolerance[str(dtype).removeprefix("torch.")]
    expected = LINEAR.reference(**inputs)
    torch.testing.assert_close(torch_functions.linear(**inputs), expected, rtol=tolerance.rtol, atol=tolerance.atol)


class TestWithAGaudi:
    """What is asked of `habana_frameworks` where it is installed: a stand-in that records."""

    def test_without_it_programs_run_on_the_cpu(self):
        assert tpc_kernels.habana() is None
        assert tpc_kernels.device() == torch.device("cpu")

    def test_with_it(self, monkeypatch):
        wrapped = []

        class Hpu:
            @staticmethod
            def is_available():
                return True

            @staticmethod
            def wrap_in_hpu_graph(module, disable_tensor_cache):
                wrapped.append((module, disable_tensor_cache))
                return module

        bridge = type("Bridge", (), {"hpu": Hpu})
        monkeypatch.setattr(tpc_kernels, "habana", lambda: bridge)
        assert tpc_kernels.device() == torch.device("hpu")
        module = torch.nn.Identity()
        tpc_kernels.as_graphs(module, torch.device("hpu"))
        assert wrapped == [(module, True)]
        assert tpc_kernels.as_graphs(module, torch.device("cpu")) is module
        assert len(wrapped) == 1

    def test_kernels(self, monkeypatch):
        operators = type("Operators", (), {"gate_0_t1": "an operator"})
        monkeypatch.setattr(tpc_kernels, "_operators", lambda: operators)
        hpu = torch.device("hpu")
        assert tpc_kernels.kernel_of("gate_0_t1", hpu) == "an operator"
        assert tpc_kernels.kernel_of("gate_0_t1", torch.device("cpu")) is None
        assert tpc_kernels.kernel_of("other_0_t1", hpu) is None, "torch's operators do it"
        assert tpc_kernels.kernel_of(None, hpu) is None

    def test_a_kernel_is_given_the_expressions_shapes(self, monkeypatch):
        from vllm_compile.schedules.gaudi import expressions

        fused = expressions.silu_mul(24, "float32")
        given = []
        monkeypatch.setattr(torch_functions, "kernel_of", lambda *_: lambda *x: given.extend(x) or (x[0][:, :1],))
        torch_functions.fused(fused.nodes, fused.results, "gate_0_t1", x=torch.zeros(5, 48))
        assert [tuple(x.shape) for x in given] == [(5, 2, 24)]

    def test_a_library_that_is_none(self, monkeypatch, tmp_path):
        (tmp_path / "lib.so").write_bytes(b"none")
        monkeypatch.setenv(tpc_kernels.LIBRARY_VARIABLE, str(tmp_path / "lib.so"))
        tpc_kernels._operators.cache_clear()
        with pytest.raises(TargetError, match=r"VLLM_COMPILE_TPC=.*cannot be loaded"):
            tpc_kernels.kernel_of("gate_0_t1", torch.device("hpu"))
        tpc_kernels._operators.cache_clear()
