"""A compiled model, loaded: what it computes, what it refuses, what it needs."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import tvm_ffi
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from vllm_compile.accuracy import relative_error
from vllm_compile.errors import ArtifactError, TargetError
from vllm_compile.paged_batch import PagedBatch
from vllm_compile.runtime import executor
from vllm_compile.runtime.program import Program, device_of, load, read_weights
from vllm_compile.targets import DETECT

from .run_steps import run_steps

# Kernels for another number of tokens add the same terms in another order.
CLOSE = 1e-5
VOCABULARY = 80


@pytest.fixture(scope="module")
def program(tiny_fp32) -> Program:
    return load(tiny_fp32)


def tokens(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=generator, dtype=torch.int32)


class TestForward:
    @pytest.fixture(scope="class")
    def hugging_face(self, tiny):
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
        return lambda ids: model(ids[None].long()).logits[0].detach()

    def test_attributes(self, program):
        assert (program.num_layers, program.num_heads, program.num_kv_heads) == (2, 4, 2)
        assert (program.head_dim, program.hidden_size, program.vocab_size) == (16, 64, VOCABULARY)
        assert (program.max_positions, program.dtype) == (256, torch.float32)

    def test_prefill_decode_and_both_equal_hugging_face(self, program, hugging_face, generator):
        prompts = [tokens(count, generator) for count in (70, 1, 33)]
        steps = [[40, 0, 0], [41, 1, 30], [69, 1, 31], [70, 1, 33]]
        for ours, prompt in zip(run_steps(program, prompts, steps), prompts, strict=True):
            assert relative_error(ours, hugging_face(prompt)) < 1e-4

    def test_another_weight_is_noticed(self, tiny_fp32, hugging_face, generator):
        """Negative control of the comparison above."""
        broken, prompt = load(tiny_fp32), tokens(40, generator)
        weights = dict(read_weights(tiny_fp32))
        name = next(name for name in weights if "layers_1_self_attn_o_proj" in name)
        broken.load_weights({**weights, name: weights[name].flip(0).contiguous()}.items())
        assert relative_error(run_steps(broken, [prompt], [[40]])[0], hugging_face(prompt)) > 1e-2

    def test_company_does_not_matter(self, program, generator):
        prompts = [tokens(count, generator) for count in (21, 48, 5)]
        together = run_steps(program, prompts, [[21, 48, 5]])
        for ours, prompt in zip(together, prompts, strict=True):
            assert relative_error(ours, run_steps(program, [prompt], [[len(prompt)]])[0]) < CLOSE

    def test_same_call_gives_same_bits(self, program, generator):
        prompt = tokens(48, generator)
        first, second = (run_steps(program, [prompt], [[47], [48]])[0] for _ in range(2))
        assert first.equal(second)

    def test_most_probable_tokens(self, program, generator):
        """In the same memory each time; of equal ones the first."""
        logits_SV = torch.randn(5, VOCABULARY, generator=generator).round()
        program.prepare(max_tokens=64, max_requests=8)
        tokens_S1 = program.greedy(logits_SV)
        expected = [[row.index(max(row))] for row in logits_SV.tolist()]
        assert tokens_S1.tolist() == expected
        assert tokens_S1.dtype == torch.int64
        fewer = program.greedy(-logits_SV[:2])
        assert fewer.data_ptr() == tokens_S1.data_ptr()
        assert fewer.tolist() == [[row.index(min(row))] for row in logits_SV[:2].tolist()]

    def test_padding_does_no_harm(self, program, generator):
        """Rows of length 0 and tokens without a slot, as an engine pads a batch for a captured graph."""
        ids = tokens(20, generator)
        batch, padded = (PagedBatch(program.plan.model, [20]) for _ in range(2))
        plain = program(ids, kv=batch.kv, **batch.step([0], [20])).clone()
        step = padded.step([0], [20])
        zeros = torch.zeros(12, dtype=torch.int64)
        hidden = program(
            torch.cat([ids, zeros.int()]),
            torch.cat([step["positions"], zeros]),
            padded.kv,
            torch.cat([step["block_table"], torch.zeros_like(step["block_table"]).repeat(3, 1)]),
            torch.cat([step["seq_lens"], torch.zeros(3, dtype=torch.int32)]),
            torch.cat([step["query_start_loc"], torch.full((3,), 20, dtype=torch.int32)]),
            torch.cat([step["slot_mapping"], zeros - 1]),
        )
        assert relative_error(hidden[:20], plain) < CLOSE
        for ours, expected in zip(padded.kv, batch.kv, strict=True):
            assert ours.isnan().equal(expected.isnan()), "written where nothing was asked for"
            assert relative_error(ours.nan_to_num(), expected.nan_to_num()) < CLOSE

    def test_outer_strides_of_the_cache_are_free(self, program, generator):
        ids = tokens(20, generator)
        batch = PagedBatch(program.plan.model, [20])
        plain = program(ids, kv=batch.kv, **batch.step([0], [20])).clone()
        strided = PagedBatch(program.plan.model, [20])
        shape = [strided.kv[0].shape[axis] for axis in (2, 0, 1, 3)]
        strided.kv = [torch.full(shape, float("nan")).permute(1, 2, 0, 3) for _ in strided.kv]
        assert program(ids, kv=strided.kv, **strided.step([0], [20])).equal(plain)
        assert all(a.nan_to_num().equal(b.nan_to_num()) for a, b in zip(strided.kv, batch.kv, strict=True))

    def test_observer_sees_and_changes_every_layer(self, program, generator):
        ids = tokens(20, generator)
        batch = PagedBatch(program.plan.model, [20])
        step = batch.step([0], [20])
        seen: list[tuple[int, torch.Tensor]] = []
        plain = program(
            ids, kv=batch.kv, **step, observer=lambda layer, hidden: seen.append((layer, hidden.clone()))
        ).clone()
        assert [layer for layer, _ in seen] == [0, 1]
        assert seen[0][1].equal(program.embed(ids))
        assert seen[1][1].shape == (20, 64)

        def replay(layer, hidden):
            hidden.copy_(seen[layer][1])

        other = tokens(20, generator)
        assert program(other, kv=batch.kv, **step, observer=replay).equal(plain)
        assert not program(other, kv=batch.kv, **step).equal(plain)

    def test_more_tokens_than_prepared_for(self, tiny_fp32, generator):
        program, prompt = load(tiny_fp32), tokens(60, generator)
        unprepared = run_steps(program, [prompt], [[60]])[0]
        program.prepare(8, 2)
        assert run_steps(program, [prompt], [[5], [60]])[0].shape == unprepared.shape
        assert run_steps(program, [prompt], [[60]])[0].equal(unprepared)

    def test_dummy_weights(self, tiny_bf16, generator):
        """Packed ones are zeros, and nothing else to a kernel: each layer leaves its input as it is."""
        program = load(tiny_bf16, weights=False)
        program.load_dummy_weights()
        assert any(weight.spec.dtype == "uint8" for weight in program.plan.functions["forward"].weights)
        batch, seen, prompt = PagedBatch(program.plan.model, [9]), list[torch.Tensor](), tokens(9, generator)
        arguments = {**batch.step([0], [9]), "observer": lambda layer, x: seen.append(x.clone())}
        hidden = program(prompt, kv=batch.kv, **arguments)
        assert torch.equal(seen[0], seen[1])
        assert not program.logits(hidden).any()

    def test_bfloat16(self, tiny_bf16, generator):
        program, prompt = load(tiny_bf16), tokens(40, generator)
        (logits,) = run_steps(program, [prompt], [[39], [40]])
        assert program.dtype == logits.dtype == torch.bfloat16
        assert logits.isfinite().all()


def few_caches(step):
    step["kv"] = step["kv"][:1]


def narrow_caches(step):
    step["kv"] = [cache[..., :16] for cache in step["kv"]]


def caches_of_another_dtype(step):
    step["kv"] = [cache.bfloat16() for cache in step["kv"]]


def caches_with_strided_rows(step):
    step["kv"] = [cache.transpose(2, 3).contiguous().transpose(2, 3) for cache in step["kv"]]


def changed(name, change):
    def apply(step):
        step[name] = change(step[name])

    apply.__name__ = name
    return apply


@pytest.mark.parametrize(
    "spoil",
    [
        changed("input_ids", torch.Tensor.long),
        changed("input_ids", lambda t: t[None]),
        changed("positions", torch.Tensor.int),
        changed("positions", lambda t: t[:-1]),
        changed("positions", lambda t: torch.cat([t, t])),
        changed("slot_mapping", torch.Tensor.int),
        changed("slot_mapping", lambda t: t[:-1]),
        changed("block_table", torch.Tensor.long),
        changed("block_table", lambda t: t.repeat(2, 1)),
        changed("seq_lens", torch.Tensor.long),
        changed("seq_lens", lambda t: t.repeat(2)),
        changed("query_start_loc", torch.Tensor.long),
        few_caches,
        narrow_caches,
        caches_of_another_dtype,
        caches_with_strided_rows,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_wrong_arguments(program, spoil, generator):
    batch = PagedBatch(program.plan.model, [20])
    step = {"input_ids": tokens(20, generator), "kv": batch.kv, **batch.step([0], [20])}
    program(**step)
    spoil(step)
    with pytest.raises((ValueError, TypeError), match=r"Mismatched|Invalid|shorter|it needs"):
        program(**step)


@pytest.mark.parametrize("hidden", [torch.zeros(3, 63), torch.zeros(64), torch.zeros(3, 64).bfloat16()])
def test_wrong_hidden_states(program, hidden):
    with pytest.raises((ValueError, TypeError), match=r"Mismatched|Invalid"):
        program.logits(hidden)


def test_what_was_bound_last_is_kept(tiny_fp32, generator, monkeypatch):
    """Of three batches: 2 goes when 4 comes, as 1 has been used since."""
    bound = []

    class Remembered(executor.Binder):
        def __init__(self, plan, kernel, slots, batch):
            super().__init__(plan, kernel, slots, batch)
            bound.append(batch.tokens)

    monkeypatch.setattr(executor, "Binder", Remembered)
    monkeypatch.setattr(executor, "BOUND_BATCHES", 3)
    program = load(tiny_fp32)
    program.prepare(max_tokens=8, max_requests=8)
    hidden_SD = torch.randn(4, program.hidden_size, generator=generator)
    expected_SV = program.logits(hidden_SD[:3]).clone()
    for rows in (1, 2, 3, 1, 4, 1, 3, 4, 2):
        logits_SV = program.logits(hidden_SD[:rows])
        assert relative_error(logits_SV[:3], expected_SV[:rows]) < CLOSE
    assert bound == [3, 1, 2, 4, 2]


def test_what_a_binding_ran_on_is_not_kept(tiny_fp32):
    """A server would hold as many hidden states as there are bindings."""
    program = load(tiny_fp32)
    program.prepare(max_tokens=8, max_requests=8)
    program.logits(torch.zeros(3, program.hidden_size))
    (bound,) = program._executor._bound.values()
    late = [(step, position) for step in bound.steps for position, _ in step.late]
    assert late
    assert all(step.arguments[position] is None for step, position in late)


@pytest.mark.parametrize(("hip", "kind", "other"), [(None, "cuda", "rocm"), ("7.0", "rocm", "cuda")])
def test_kernels_run_on_torchs_stream(hip, kind, other, monkeypatch):
    stream = SimpleNamespace(device_index=1, cuda_stream=0x1230)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    with executor.torch_stream(torch.device("cuda")):
        assert tvm_ffi.get_raw_stream(tvm_ffi.device(kind, 1)) == 0x1230
        assert not tvm_ffi.get_raw_stream(tvm_ffi.device(kind, 0))
        assert not tvm_ffi.get_raw_stream(tvm_ffi.device(other, 1))
    assert not tvm_ffi.get_raw_stream(tvm_ffi.device(kind, 1))


class TestWeights:
    @pytest.fixture
    def weights(self, tiny_fp32) -> dict[str, torch.Tensor]:
        return {
            name: tensor for shard in tiny_fp32.glob("model-*.safetensors") for name, tensor in load_file(shard).items()
        }

    def test_given_by_hand(self, tiny_fp32, program, weights, generator):
        other, prompt = load(tiny_fp32, weights=False), tokens(20, generator)
        other.load_weights(weights.items())
        assert run_steps(other, [prompt], [[20]])[0].equal(run_steps(program, [prompt], [[20]])[0])

    def test_bytes(self, tiny_fp32, program, weights):
        assert program.stored_bytes() == sum(tensor.nbytes for tensor in weights.values())

    def test_missing(self, tiny_fp32, weights):
        name = sorted(weights)[0]
        del weights[name]
        with pytest.raises(ArtifactError, match=f"{name}' is missing"):
            load(tiny_fp32, weights=False).load_weights(weights.items())

    def test_unknown(self, tiny_fp32, weights):
        with pytest.raises(ArtifactError, match="'extra' is no weight"):
            load(tiny_fp32, weights=False).load_weights([*weights.items(), ("extra", torch.zeros(1))])

    @pytest.mark.parametrize("change", [torch.Tensor.bfloat16, lambda t: t[..., :-1]], ids=["dtype", "shape"])
    def test_of_another_kind(self, tiny_fp32, weights, change):
        name = sorted(weights)[0]
        weights[name] = change(weights[name])
        with pytest.raises(ArtifactError, match=f"{name}' is not as plan.json says"):
            load(tiny_fp32, weights=False).load_weights(weights.items())


RUN = """
import sys, torch
from vllm_compile import load
from vllm_compile.paged_batch import PagedBatch
program = load(sys.argv[1])
batch = PagedBatch(program.plan.model, [9])
hidden = program(torch.zeros(9, dtype=torch.int32), kv=batch.kv, **batch.step([0], [9]))
assert program.logits(hidden).isfinite().all()
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_runs_without_tvm(tiny_fp32):
    done = subprocess.run([sys.executable, "-c", RUN, tiny_fp32], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "tvm_ffi" in modules
    assert {"tvm", "transformers"}.isdisjoint(modules)


def test_library_needs_no_tvm(tiny_fp32):
    linked = subprocess.run(["ldd", tiny_fp32 / "kernels.so"], capture_output=True, text=True, check=True)
    names = {line.split()[0].split(".")[0] for line in linked.stdout.splitlines()}
    assert not any("libtvm" in name and name != "libtvm_ffi" for name in names)


def test_every_targets_device():
    """By the name of a chip too."""
    devices = {name: device_of(name).type for name in DETECT}
    cpu = {"cpu", "gaudi2", "gaudi3"}  # without a Gaudi
    assert devices == {name: "cpu" if name in cpu else "cuda" for name in DETECT}
    with pytest.raises(TargetError, match="unknown target 'h300'"):
        device_of("h300")
