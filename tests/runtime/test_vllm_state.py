"""What vLLM's runner for GPUs asks of a compiled model beside its forward pass; the runner itself needs a GPU.

vLLM's sampler is a stand-in that says what it was asked; requests' parameters and configurations are vLLM's.
"""

from copy import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.sampling_params import RepetitionDetectionParams, RequestOutputKind, StructuredOutputsParams
from vllm.v1.worker.gpu.model_states import init_model_state
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState

from tests.conftest import SEED
from tests.runtime import torch_program
from tests.runtime.tiny_llama import save_artifact
from vllm_compile.runtime import program as programs
from vllm_compile.runtime import vllm_model
from vllm_compile.runtime.decode_tail import DecodeTail
from vllm_compile.runtime.prompt_graphs import MOST_TOKENS, MOST_TOKENS_OF_LARGE, TOKENS
from vllm_compile.runtime.vllm_backend import PagedMetadata
from vllm_compile.runtime.vllm_model import VllmCompileForCausalLM
from vllm_compile.runtime.vllm_processes import HOST_BOUND_BYTES
from vllm_compile.runtime.vllm_state import WITHOUT_A_SAY, CompiledModelState, GreedySampler, is_greedy

CPU = torch.device("cpu")
REQUESTS, VOCABULARY = 4, 32
PREPARED = {"a layer": "metadata"}
INPUTS = [object()] * 4  # of attention: block tables, slot mappings, groups, and how the cache is made


class Sampler:
    """vLLM's, as far as it is asked."""

    compute_nans = False
    penalties_state = object()

    def __init__(self) -> None:
        self.asked: list[str] = []

    def add_request(self, *arguments: object) -> None:
        self.asked.append("add")

    def apply_staged_writes(self) -> None:
        self.asked.append("write")

    def __call__(self, logits: torch.Tensor, batch: object) -> str:
        self.asked.append("sample")
        return "vLLM's"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> str:
    return str(save_artifact(tmp_path_factory.mktemp("model"), SEED))


@pytest.fixture
def config(artifact, monkeypatch):
    """vLLM's configuration for the artifact."""
    monkeypatch.setattr(programs, "load", torch_program.load)
    return EngineArgs(artifact, max_num_seqs=REQUESTS, max_num_batched_tokens=64).create_engine_config()


@pytest.fixture(name="logits_RV")
def logits(generator) -> torch.Tensor:
    return torch.randn(REQUESTS, VOCABULARY, generator=generator)


@pytest.fixture
def tail(logits_RV) -> DecodeTail:
    greedy = partial(torch.argmax, dim=-1, keepdim=True)
    tail = DecodeTail(lambda hidden_RD: logits_RV[: len(hidden_RD)], greedy, REQUESTS)
    tail.record(torch.zeros(REQUESTS, 1))
    return tail


@pytest.fixture
def state(config, tail, monkeypatch) -> CompiledModelState:
    def prepare_attn(*arguments, **options):
        return PREPARED

    monkeypatch.setattr(DefaultModelState, "prepare_attn", prepare_attn)
    return CompiledModelState(config, SimpleNamespace(tail=tail), None, CPU)


def batch(
    places: list[int], tokens: int | None = None, padded: tuple[int, int] | None = None, prefilling: bool = False
):
    """A step of the requests at these places; `padded`: tokens and requests of its graph."""
    requests = len(places)
    padded_tokens, padded_requests = padded or (REQUESTS, REQUESTS)
    return SimpleNamespace(
        num_reqs=requests,
        num_tokens=tokens or requests,
        num_tokens_after_padding=padded_tokens,
        num_reqs_after_padding=padded_requests,
        idx_mapping_np=np.array(places),
        is_prefilling_np=np.array([False] * (requests - 1) + [prefilling]),
    )


class TestModel:
    """The model class from capture to the logits of a replayed step; the stand-in computes what it is told."""

    @pytest.fixture
    def model(self, config, generator, monkeypatch) -> VllmCompileForCausalLM:
        model = VllmCompileForCausalLM(vllm_config=config)
        hidden_TD = torch.randn(8, model.program.hidden_size, generator=generator)
        model.program.load_weights()
        monkeypatch.setattr(model.program, "forward", lambda input_ids, **rest: hidden_TD[: len(input_ids)])
        return model

    def step(self, model, config, tokens: int, requests: int) -> torch.Tensor:
        """Hidden states of a step of so many tokens, as vLLM has them computed."""
        integers = torch.zeros(tokens, dtype=torch.int64)
        given = integers.new_zeros(requests, 1), integers[:requests], integers.new_zeros(requests + 1)
        metadata = PagedMetadata(*given, integers)
        by_layer = {layer.layer_name: metadata for layer in model.layers}
        with set_forward_context(by_layer, config, num_tokens=tokens):
            return model(integers, integers)

    def test_logits_and_tokens_of_a_captured_graph(self, model, config, monkeypatch):
        monkeypatch.setattr(model.tail, "recording", True)
        expected_RV = model.program.logits(self.step(model, config, 4, 4)).clone()
        monkeypatch.setattr(model.tail, "recording", False)
        model.tail.begin(3)
        asked = torch.full((3, model.program.hidden_size), float("nan"))
        assert torch.equal(model.compute_logits(asked), expected_RV[:3])
        assert torch.equal(model.tail.tokens(3), expected_RV[:3].argmax(-1, keepdim=True))
        assert model.compute_logits(asked).isnan().all(), "the second time of a step they are computed"

    @pytest.mark.parametrize(("host_bound", "longest"), [(True, MOST_TOKENS), (False, MOST_TOKENS_OF_LARGE)])
    def test_prompts_are_replayed_once_they_are_recorded(self, model, config, monkeypatch, host_bound, longest):
        """Those that are short for their model; what decodes is not."""
        forward, ran = model.program.forward, []
        monkeypatch.setattr(model.program, "stored_bytes", lambda: HOST_BOUND_BYTES - host_bound, raising=False)
        monkeypatch.setattr(model.program, "forward", lambda **step: ran.append(len(step["kv"])) or forward(**step))
        monkeypatch.setattr(vllm_model, "cuda_graphs", lambda: lambda run: (partial(ran.append, "replayed"), run()))
        monkeypatch.setattr(config.scheduler_config, "max_num_batched_tokens", 4096)
        for layer in model.layers:
            layer.kv_cache = torch.empty(4, layer.num_kv_heads, 16, 2 * layer.head_dim)
        model.record_prompts(config)
        assert ran == [len(model.layers)] * sum(tokens <= longest for tokens in TOKENS)
        ran.clear()
        model.first_position = 7
        self.step(model, config, 4, 2)
        assert ran == ["replayed"]
        assert model.prompts._inputs["positions"][:4].tolist() == [7] * 4
        assert model.prompts._inputs["query_start_loc"][:4].tolist() == [0] * 4
        self.step(model, config, 4, 4)
        assert ran == ["replayed", len(model.layers)]

    @pytest.mark.parametrize(("recording", "tokens", "requests"), [(False, 4, 4), (True, 4, 2)])
    def test_nothing_is_recorded_otherwise(self, model, config, monkeypatch, recording, tokens, requests):
        monkeypatch.setattr(model.tail, "recording", recording)
        self.step(model, config, tokens, requests)
        model.tail.begin(requests)
        assert model.tail.tokens(requests) is None


class TestState:
    def test_vllm_finds_it(self, config, tail):
        model = SimpleNamespace(tail=tail, get_model_state_cls=VllmCompileForCausalLM.get_model_state_cls)
        assert isinstance(init_model_state(config, model, None, CPU), CompiledModelState)

    def test_a_replayed_step_needs_no_metadata(self, state, tail):
        assert state.prepare_attn(batch([0, 1, 2]), CUDAGraphMode.FULL, *INPUTS) == {}
        assert tail.logits(3) is not None
        assert not tail.recording

    def test_a_step_without_a_graph_does(self, state, tail):
        state.prepare_attn(batch([0, 1, 2]), CUDAGraphMode.FULL, *INPUTS)
        assert state.prepare_attn(batch([0, 1, 2]), CUDAGraphMode.NONE, *INPUTS) == PREPARED
        assert tail.logits(3) is None
        assert tail.tokens(3) is None

    def test_capture_does_and_records(self, state, tail):
        assert state.prepare_attn(batch([0, 1]), CUDAGraphMode.FULL, *INPUTS, for_capture=True) == PREPARED
        assert tail.recording
        state.prepare_attn(batch([0, 1]), CUDAGraphMode.NONE, *INPUTS)
        assert not tail.recording

    @pytest.mark.parametrize(
        ("tokens", "padded"),
        [(5, (8, 4)), (3, (8, 4)), (5, (4, 4))],
        ids=["prompts", "graph of prompts", "prompts in a graph like one of decode"],
    )
    def test_no_tokens_of_a_graph_where_requests_may_have_several(self, state, tail, tokens, padded):
        state.prepare_attn(batch([0, 1, 2], tokens, padded), CUDAGraphMode.FULL, *INPUTS)
        assert tail.logits(3) is None
        assert tail.tokens(3) is None

    @pytest.mark.parametrize("reader", ["speculative_config", "kv_transfer_config"])
    def test_others_get_the_metadata_they_read(self, config, tail, state, monkeypatch, reader):
        monkeypatch.setattr(config, reader, object())
        state = CompiledModelState(config, SimpleNamespace(tail=tail), None, CPU)
        assert state.prepare_attn(batch([0]), CUDAGraphMode.FULL, *INPUTS) == PREPARED

    def test_custom_sampler(self, state):
        sampler, rejection = state.custom_sampler(Sampler())
        assert isinstance(sampler, GreedySampler)
        assert rejection is None

    @pytest.mark.parametrize("feature", ["speculative_config", "watermark_config"])
    def test_vllms_sampler_is_kept_for_features_of_the_engine(self, state, config, monkeypatch, feature):
        monkeypatch.setattr(config, feature, object())
        assert state.custom_sampler(Sampler()) is None

    @pytest.mark.parametrize("feature", ["logits_processors", "enable_trace_replay", "return_sampling_mask"])
    def test_vllms_sampler_is_kept_for_features_of_the_model(self, state, config, monkeypatch, feature):
        monkeypatch.setattr(config.model_config, feature, [object()])
        assert state.custom_sampler(Sampler()) is None

    def test_vllms_sampler_is_kept_for_plugins(self, state):
        sampler = Sampler()
        sampler.logits_processors = [object.__new__(BadWordsState), SimpleNamespace()]
        assert state.custom_sampler(sampler) is None

    def test_vllms_own_processors_are_known_by_parameters(self, state):
        sampler = Sampler()
        sampler.logits_processors = [object.__new__(BadWordsState)]
        assert state.custom_sampler(sampler) is not None

    def test_vllms_sampler_is_kept_where_nans_are_counted(self, state):
        sampler = Sampler()
        sampler.compute_nans = True
        assert state.custom_sampler(sampler) is None


class TestSampler:
    @pytest.fixture
    def base(self) -> Sampler:
        return Sampler()

    @pytest.fixture
    def sampler(self, base, tail) -> GreedySampler:
        """With greedy requests at places 0 to 2, and one that draws at 3."""
        sampler = GreedySampler(base, tail, REQUESTS, CPU)
        for place in range(3):
            sampler.add_request(place, 10, SamplingParams(temperature=0))
        sampler.add_request(3, 10, SamplingParams(temperature=1))
        return sampler

    def test_greedy_tokens(self, sampler, base, tail, logits_RV):
        tail.begin(3)
        found = sampler(logits_RV[:3], batch([2, 0, 1]))
        assert found.sampled_token_ids.tolist() == logits_RV[:3].argmax(-1, keepdim=True).tolist()
        assert (found.num_sampled.tolist(), found.num_rejected.tolist()) == ([1] * 3, [0] * 3)
        assert {found.sampled_token_ids.dtype, found.num_sampled.dtype} == {torch.int64, torch.int32}
        assert found.logprobs_tensors is None
        assert "sample" not in base.asked

    def test_one_that_draws_among_them(self, sampler, tail, logits_RV):
        tail.begin(3)
        assert sampler(logits_RV[:3], batch([0, 3, 1])) == "vLLM's"

    def test_a_place_that_another_request_takes(self, sampler, tail, logits_RV):
        sampler.add_request(1, 10, SamplingParams(temperature=0, logprobs=1))
        sampler.add_request(3, 10, SamplingParams(temperature=0))
        tail.begin(2)
        assert sampler(logits_RV[:2], batch([0, 1])) == "vLLM's"
        assert sampler(logits_RV[:2], batch([0, 3])) != "vLLM's"

    def test_a_prompt_that_has_not_ended(self, sampler, tail, logits_RV):
        tail.begin(3)
        assert sampler(logits_RV[:3], batch([0, 1, 2], prefilling=True)) == "vLLM's"

    def test_a_step_without_tokens(self, sampler, tail, logits_RV):
        tail.begin(0)
        assert sampler(logits_RV[:3], batch([0, 1, 2])) == "vLLM's"

    def test_parameters_are_written_once(self, sampler, base):
        for _ in range(3):
            sampler.apply_staged_writes()
        assert base.asked.count("write") == 1
        sampler.add_request(0, SamplingParams())  # as from vLLM 0.32 on
        sampler.apply_staged_writes()
        assert base.asked.count("write") == 2

    def test_what_the_first_step_finds_is_written(self, base, tail):
        GreedySampler(base, tail, REQUESTS, CPU).apply_staged_writes()
        assert base.asked == ["write"]

    def test_a_copy_is_no_endless_question(self, sampler):
        assert copy(sampler).penalties_state is Sampler.penalties_state

    def test_all_else_is_vllms(self, sampler):
        assert sampler.penalties_state is Sampler.penalties_state
        with pytest.raises(AttributeError):
            sampler.nothing_that_is  # noqa: B018


GREEDY = {
    "seed": 3,
    "stop": ["a"],
    "stop_token_ids": [7],
    "ignore_eos": True,
    "max_tokens": 99,
    "prompt_logprobs": 2,
    "flat_logprobs": True,
    "detokenize": False,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "output_kind": RequestOutputKind.DELTA,
    "skip_reading_prefix_cache": True,
    "repetition_detection": RepetitionDetectionParams(max_pattern_size=2, min_count=2),
    "top_k": 5,  # vLLM drops these of a greedy request
    "top_p": 0.5,
    "min_p": 0.1,
}
NOT_GREEDY = {
    "temperature": 0.5,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.1,
    "min_tokens": 1,
    "logprobs": 0,
    "logprob_token_ids": [3],
    "logit_bias": {3: 1.0},
    "allowed_token_ids": [3, 4],
    "bad_words": ["a"],
    "structured_outputs": StructuredOutputsParams(regex="a"),
    "extra_args": {"a": 1},
    "thinking_token_budget": 5,
}


@pytest.mark.parametrize("field", GREEDY)
def test_greedy(field):
    assert is_greedy(SamplingParams(**{"temperature": 0} | {field: GREEDY[field]}))


@pytest.mark.parametrize("field", NOT_GREEDY)
def test_not_greedy(field):
    assert not is_greedy(SamplingParams(**{"temperature": 0} | {field: NOT_GREEDY[field]}))


# What vLLM sets itself, or what is for vLLM's developers.
OTHERS = {"watermarking", "_watermarking_skipped", "_bad_words_token_ids", "trace_decode_token_ids"}


def test_what_vllm_adds_has_a_say():
    """Each of vLLM's parameters is known to have none, or is compared with its default: what is new is decided here."""
    params, compared = SamplingParams(temperature=0), set(SamplingParams.__struct_fields__) - WITHOUT_A_SAY
    assert compared - set(GREEDY) == set(NOT_GREEDY) | OTHERS | {"n"}
    for field in compared - {"temperature"}:
        kept = getattr(params, field)
        setattr(params, field, "something else")
        assert not is_greedy(params), field
        setattr(params, field, kept)
    assert is_greedy(params)
