"""What vLLM's runner for GPUs (its second) lets a model decide: what a step needs of it, and how tokens are chosen.

Both hooks are vLLM's (`get_model_state_cls` and `ModelState.custom_sampler`, since 0.26).  Here they do less on the
host, which a step of a small model waits for.  What a request asks for beyond greedy tokens is done by vLLM's own
sampler, as ever.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from .decode_tail import DecodeTail

# Of SamplingParams: what has no say in which token comes next, once that is the most probable one.  What vLLM adds in a
# later version is not among them: a request that sets it gets vLLM's sampler.
WITHOUT_A_SAY = frozenset(
    {
        "seed",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "max_tokens",
        "prompt_logprobs",
        "prompt_logprob_token_ids",
        "prompt_logprob_start",
        "flat_logprobs",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "output_kind",
        "stream_interval",
        "skip_clone",
        "output_text_buffer_length",
        "_eos_token_id",
        "_all_stop_token_ids",
        "skip_reading_prefix_cache",
        "repetition_detection",
        "routed_experts_prompt_start",
    }
)


class CompiledModelState(DefaultModelState):
    """A compiled program's part in a step.

    The graph of a step knows where its inputs are: to replay it no metadata has to be made.
    """

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.tail: DecodeTail = model.tail
        # These look at metadata of steps that are replayed, too.
        readers = vllm_config.speculative_config, vllm_config.kv_transfer_config
        self._needs_metadata = any(reader is not None for reader in readers)

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: CUDAGraphMode,
        block_tables: Any,
        slot_mappings: Any,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        *more: Any,  # of later versions
        **named: Any,
    ) -> dict[str, Any]:
        """The metadata of each layer by its name; none for a step that is replayed."""
        replayed = cudagraph_mode == CUDAGraphMode.FULL and not for_capture
        self.tail.recording = for_capture
        # As `VllmCompileForCausalLM.forward` saw it when the graph was captured; and each request's one token is what
        # logits are asked for.
        recorded = input_batch.num_tokens_after_padding == input_batch.num_reqs_after_padding
        decode = input_batch.num_tokens == input_batch.num_reqs
        self.tail.begin(input_batch.num_reqs if replayed and recorded and decode else 0)
        if replayed and not self._needs_metadata:
            return {}
        given = block_tables, slot_mappings, attn_groups, kv_cache_config, for_capture, *more
        return super().prepare_attn(input_batch, cudagraph_mode, *given, **named)

    def custom_sampler(self, sampler: Any) -> tuple[Any, None] | None:
        """A sampler that has greedy tokens from the graph; None, which keeps vLLM's, where not only requests decide."""
        config, model = self.vllm_config, self.model_config
        others = (
            config.speculative_config is not None,
            getattr(config, "watermark_config", None) is not None,
            bool(model.logits_processors),
            # Those that plugins bring, from vLLM 0.32 on.
            any(not type(p).__module__.startswith("vllm.") for p in getattr(sampler, "logits_processors", ())),
            getattr(model, "enable_trace_replay", False),
            getattr(model, "return_sampling_mask", False),
            sampler.compute_nans,
        )
        return None if any(others) else (GreedySampler(sampler, self.tail, self.max_num_reqs, self.device), None)


class GreedySampler:
    """vLLM's sampler, left out of steps whose requests all want the most probable token and nothing else.

    Args:
        sampler: vLLM's, which does all other steps, and whatever else is asked of a sampler.
        tail: where the tokens come from.
        max_requests: at a time.
        device: where tokens are.
    """

    def __init__(self, sampler: Any, tail: DecodeTail, max_requests: int, device: torch.device) -> None:
        self._sampler, self._tail = sampler, tail
        self._greedy = np.zeros(max_requests, dtype=bool)  # by the request's place
        self._staged = True
        one, none = (torch.full((max_requests,), count, dtype=torch.int32, device=device) for count in (1, 0))
        # By the number of requests: slices of tensors take longer to make than to look up.
        self._counts = [(one[:rows], none[:rows]) for rows in range(max_requests + 1)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of a copy that is being made: it has no sampler yet
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def add_request(self, place: int, *more: Any) -> None:
        """As vLLM's, whose last argument are the request's SamplingParams."""
        self._sampler.add_request(place, *more)
        self._greedy[place] = is_greedy(more[-1])
        self._staged = True

    def apply_staged_writes(self) -> None:
        """As vLLM's, which copies all requests' parameters in every step, whether they have changed or not."""
        if self._staged:
            self._sampler.apply_staged_writes()
            self._staged = False

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> SamplerOutput:
        """logits [R, V] -> a token each, but none of a prompt that has not ended: steps with any are left to vLLM."""
        if self._greedy[input_batch.idx_mapping_np].all() and not input_batch.is_prefilling_np.any():
            tokens_R1 = self._tail.tokens(input_batch.num_reqs)
            if tokens_R1 is not None:
                sampled, rejected = self._counts[input_batch.num_reqs]
                return SamplerOutput(
                    sampled_token_ids=tokens_R1,
                    logprobs_tensors=None,
                    num_nans=None,
                    num_sampled=sampled,
                    num_rejected=rejected,
                )
        return self._sampler(logits, input_batch)


def is_greedy(params: SamplingParams) -> bool:
    """True if a request wants the most probable token each time, and nothing but tokens."""
    return params.temperature == 0 and all(getattr(params, name) == default for name, default in _defaults())


@cache
def _defaults() -> tuple[tuple[str, Any], ...]:
    """Of the parameters that do have a say, temperature aside."""
    plain = SamplingParams()
    names = set(SamplingParams.__struct_fields__) - WITHOUT_A_SAY - {"temperature"}
    return tuple((name, getattr(plain, name)) for name in sorted(names))
