"""vLLM's second runner for GPUs, which does not prepare again what a decode step shares with the step before.

vLLM writes the inputs of each step anew: which requests it has, where each one's tokens begin, which rows logits are
wanted of, every request's blocks.  Of Llama-3.2-1B's step with 8 requests that takes 511 of the 1,015 microseconds that
the worker's process computes (benchmarks/baseline.md).  While requests stay the same, as in most of a server's steps,
only positions, lengths, slots and the tokens themselves change, and blocks where a request got one.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from .advance_step import advance_step

logger = init_logger("vllm.compiled_artifact")  # below vLLM's own, which says where lines go

# Fields of a step's InputBatch.  Those of a later version are in none of these, and steps are prepared as it has them.
SAME = frozenset(  # the very objects of the step before; tensors' contents may be new
    {
        "req_ids",
        "num_reqs",
        "num_reqs_after_padding",
        "idx_mapping",
        "idx_mapping_np",
        "expanded_idx_mapping",
        "expanded_local_pos",
        "num_scheduled_tokens",
        "num_tokens",
        "num_tokens_after_padding",
        "num_draft_tokens",
        "query_start_loc",
        "query_start_loc_np",
        "seq_lens",
        "prefill_len_np",
        "num_computed_prefill_tokens_np",
        "is_prefilling_np",
        "has_prefill",
        "decode_graph_eligible",
        "input_ids",
        "positions",
        "is_padding",
        "cu_num_logits",
        "cu_num_logits_np",
        "logits_indices",
    }
)
OTHERS = frozenset(  # objects of the step's own
    {"num_computed_tokens_np", "seq_lens_cpu_upper_bound", "has_structured_output_reqs"}
)
ABSENT = frozenset(  # None in every step that is repeated
    {
        "num_draft_tokens_per_req",
        "dcp_local_seq_lens",
        "dcp_local_seq_lens_cpu_upper_bound",
        "max_seq_len_np",
        "max_query_len",
        "fast_prefill",
        "prefill_runs_as_decode_np",
        "prompt_lens",
    }
)


@dataclass
class Step:
    """A decode step that the next may repeat."""

    tokens: dict[str, int]  # by request
    graph: BatchExecutionDescriptor
    batch: InputBatch
    attention: tuple[tuple[torch.Tensor, ...], torch.Tensor] | None = None  # tables of blocks, slots: of each group


class CompiledRunner(GPUModelRunner):
    """What vLLM's runner has become where `repeat_steps` said so."""

    _last: Step | None = None

    def prepare_inputs(self, scheduler_output: Any, *more: Any, **named: Any) -> InputBatch:
        """As vLLM's, in the same memory; a step that is repeated keeps the order of its requests.

        What else is given differs by version; the graph that is to be replayed is among it.
        """
        last, self._last = self._last, None
        given = (*more, *named.values())
        graph = next((part for part in given if isinstance(part, BatchExecutionDescriptor)), None)
        if last is None or not repeats(last, scheduler_output, graph, self.req_states):
            batch = super().prepare_inputs(scheduler_output, *more, **named)
            if graph is not None and may_be_repeated(batch, graph):
                self._last = Step(scheduler_output.num_scheduled_tokens, graph, batch)
            return batch
        batch = self._advanced(last.batch)
        batch.has_structured_output_reqs = scheduler_output.has_structured_output_requests
        self._last = replace(last, batch=batch)
        return batch

    def _advanced(self, batch: InputBatch) -> InputBatch:
        """The batch with a token more of each request."""
        batch = copy(batch)
        self._write_inputs(batch.idx_mapping)
        batch.num_computed_tokens_np = self.req_states.num_computed_tokens_np[batch.idx_mapping_np]
        lengths = np.zeros(batch.num_reqs_after_padding, dtype=np.int32)
        np.add(batch.num_computed_tokens_np, 1, out=lengths[: batch.num_reqs])
        batch.seq_lens_cpu_upper_bound = torch.from_numpy(lengths)
        return batch

    def _write_inputs(self, places: torch.Tensor) -> None:
        """Of a decode step of the requests at these places, to where its graph reads them."""
        states, buffers, tables = self.req_states, self.input_buffers, self.block_tables
        advance_step(
            places,
            states.num_computed_tokens.gpu,
            states.last_sampled_tokens,
            tables.block_tables[0].gpu,
            tables.block_sizes_tensor,
            buffers.input_ids,
            buffers.positions,
            buffers.seq_lens,
            tables.input_block_tables[0],
            tables.slot_mappings[0],
        )

    def prepare_attn(self, input_batch: InputBatch, *more: Any) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """As vLLM's: each request's blocks, and tokens' slots; a step that is repeated has them already."""
        last = self._last
        if last is None or input_batch is not last.batch:
            return super().prepare_attn(input_batch, *more)
        if last.attention is None:
            last.attention = super().prepare_attn(input_batch, *more)
        return last.attention

    def _dummy_run(self, *given: Any, **named: Any) -> Any:
        """As vLLM's, which writes over the inputs of the step before."""
        self._last = None
        return super()._dummy_run(*given, **named)

    def capture_model(self, *given: Any, **named: Any) -> Any:
        """As vLLM's, which does so, too; no request is to wait until the kernel of repeated steps is compiled."""
        self._last = None
        captured = super().capture_model(*given, **named)
        # Of no request, for none to read; of which type places are differs by version.
        self._write_inputs(InputBatch.make_dummy(1, 1, self.input_buffers).idx_mapping)
        return captured

    def initialize_kv_cache(self, *given: Any, **named: Any) -> None:
        """As vLLM's, which makes other buffers for them."""
        self._last = None
        super().initialize_kv_cache(*given, **named)


def repeats(last: Step, scheduler_output: Any, graph: BatchExecutionDescriptor | None, states: Any) -> bool:
    """Whether a step decodes for the requests of the last, in the places that they have in the runner's states.

    One that was preempted and came back, or whose name is used again, is among the new ones, as vLLM's scheduler says
    it to this runner.
    """
    places = last.batch.idx_mapping_np
    return (
        last.attention is not None
        and len(last.attention[0]) == 1
        and scheduler_output.num_scheduled_tokens == last.tokens
        and graph == last.graph
        and not scheduler_output.scheduled_new_reqs
        and not scheduler_output.scheduled_cached_reqs.resumed_req_ids
        and bool((states.num_computed_tokens_np[places] >= last.batch.prefill_len_np).all())
    )


def may_be_repeated(batch: InputBatch, graph: BatchExecutionDescriptor) -> bool:
    """Whether all that a step is made of is known here: a token for each request, none of a prompt, by a graph."""
    return (
        graph.cg_mode == CUDAGraphMode.FULL
        and batch.num_tokens == batch.num_reqs
        and not batch.is_prefilling_np.any()
        and all(getattr(batch, name, None) is None for name in ABSENT)
    )


def repeat_steps(runner: Any) -> None:
    """Makes a runner of vLLM's a `CompiledRunner`, which begins with no step to repeat.

    Not where another rank, a drafter or a version of vLLM that is not known here has a part in what a step's inputs
    are; vLLM's log says so.  vLLM's worker names its runner's class inside a function, so the runner changes class when
    it is there.
    """
    if type(runner) not in (GPUModelRunner, CompiledRunner):
        return  # vLLM's first
    config = runner.vllm_config
    unknown = {field.name for field in fields(InputBatch)} - SAME - OTHERS - ABSENT
    whys = {
        "several ranks": config.parallel_config.world_size_across_dp > 1,
        "speculation": config.speculative_config is not None,
        f"a vLLM whose steps have {', '.join(sorted(unknown))}": bool(unknown),
    }
    if any(whys.values()):
        logger.info("Each step's inputs are prepared anew: %s", ", ".join(why for why, given in whys.items() if given))
        return
    runner.__class__, runner._last = CompiledRunner, None
