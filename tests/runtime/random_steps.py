"""Random steps of a server, for vLLM's second runner for GPUs to prepare on a CPU.

Runner, batches and buffers are vLLM's; its Triton kernels need a GPU, so their definitions in torch stand in for them,
and for its block tables.
"""

from __future__ import annotations

import random
from copy import copy
from types import SimpleNamespace

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import CachedRequestData
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

CPU = torch.device("cpu")
PLACES, LENGTH, TOKENS, BLOCK_SIZE, NO_SLOT = 8, 64, 96, 4, -1
WIDTH = LENGTH // BLOCK_SIZE


def prepare_prefill_inputs(input_ids, next_prefill_tokens, places, query_start_loc, all_ids, prefill_len, computed):
    for i, place in enumerate(places.tolist()):
        begin, end = query_start_loc[i : i + 2].tolist()
        if computed[place] < prefill_len[place]:
            input_ids[begin:end] = all_ids[place, computed[place] : computed[place] + end - begin]


def prepare_pos_seq_lens(places, query_start_loc, computed, positions, seq_lens):
    seq_lens.zero_()
    for i, place in enumerate(places.tolist()):
        begin, end = query_start_loc[i : i + 2].tolist()
        seq_lens[i] = computed[place] + end - begin
        positions[begin:end] = computed[place] + torch.arange(end - begin)


def combine_sampled_and_draft_tokens(
    input_ids, places, sampled, query_start_loc, seq_lens, prefill_len, drafts, cu_num_logits, num_logits, new_tokens
):
    if not (new_tokens == 1 and num_logits == len(places) == cu_num_logits[-1]):
        raise ValueError("speculation")
    last = query_start_loc[1 : len(places) + 1].long() - 1
    for i, place in enumerate(places.tolist()):
        if seq_lens[i] > prefill_len[place]:
            input_ids[last[i]] = sampled[place, 0]
    return last


def advance_step(places, computed, sampled, blocks, block_size, input_ids, positions, seq_lens, table, slots):
    (size,) = block_size.tolist()
    for i, place in enumerate(places.tolist()):
        position = int(computed[place])
        table[i, position // size] = blocks[place, position // size]
        input_ids[i], positions[i], seq_lens[i] = sampled[place, 0], position, position + 1
        slots[i] = table[i, position // size] * size + position % size


class BlockTables:
    """vLLM's: of each place, and once more in the order of the step's requests."""

    def __init__(self) -> None:
        self.of_places = torch.full((PLACES, WIDTH), -7, dtype=torch.int32)
        self.block_tables = [SimpleNamespace(gpu=self.of_places)]
        self.block_sizes_tensor = torch.tensor([BLOCK_SIZE], dtype=torch.int32)
        self.counts = np.zeros(PLACES, dtype=int)
        self.input_block_tables = [torch.full_like(self.of_places, -7)]
        self.slot_mappings = torch.full((1, TOKENS), -7)
        self.gathered = 0

    def append(self, place: int, blocks: list[int], overwrite: bool) -> None:
        begin = 0 if overwrite else self.counts[place]
        self.of_places[place, begin : begin + len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        self.counts[place] = begin + len(blocks)

    def gather_block_tables(self, places, num_reqs_padded):
        self.gathered += 1
        for i, place in enumerate(places.tolist()):
            self.input_block_tables[0][i, : self.counts[place]] = self.of_places[place, : self.counts[place]]
        self.input_block_tables[0][len(places) : num_reqs_padded] = 0
        return (self.input_block_tables[0][:num_reqs_padded],)

    def compute_slot_mappings(self, places, query_start_loc, positions, num_tokens_padded):
        self.slot_mappings.fill_(NO_SLOT)
        for i, place in enumerate(places.tolist()):
            begin, end = query_start_loc[i : i + 2].tolist()
            p = positions[begin:end]
            self.slot_mappings[0, begin:end] = self.of_places[place, p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
        return self.slot_mappings[:, :num_tokens_padded]


def vllms_runner() -> GPUModelRunner:
    """vLLM's, as far as it prepares inputs."""
    runner = object.__new__(GPUModelRunner)
    states = SimpleNamespace(
        req_id_to_index={},
        num_computed_tokens=SimpleNamespace(gpu=torch.zeros(PLACES, dtype=torch.int32)),
        num_computed_tokens_np=np.zeros(PLACES, dtype=np.int32),
        num_computed_prefill_tokens=np.zeros(PLACES, dtype=np.int32),
        prefill_len=SimpleNamespace(gpu=torch.zeros(PLACES, dtype=torch.int32), np=np.zeros(PLACES, dtype=np.int32)),
        all_token_ids=SimpleNamespace(gpu=torch.zeros(PLACES, LENGTH, dtype=torch.int32)),
        last_sampled_tokens=torch.zeros(PLACES, 1, dtype=torch.int64),
        draft_tokens=torch.zeros(PLACES, 0, dtype=torch.int64),
        next_prefill_tokens=torch.zeros(1, PLACES, dtype=torch.int32),
    )
    vars(runner).update(
        device=CPU,
        max_num_reqs=PLACES,
        decode_query_len=1,
        use_pp=False,
        req_states=states,
        input_buffers=InputBuffers(PLACES, TOKENS, CPU),
        block_tables=BlockTables(),
        model_state=SimpleNamespace(num_new_sampled_tokens_per_step=1),
        model_config=SimpleNamespace(rswa_window=None),
        adaptive_verification=None,
        fast_prefill=None,
        pcp_manager=None,
        vllm_config=configuration(),
    )
    return runner


def configuration(ranks: int = 1, speculative: object = None) -> SimpleNamespace:
    parallel = SimpleNamespace(world_size_across_dp=ranks)
    return SimpleNamespace(parallel_config=parallel, speculative_config=speculative)


class Server:
    """A scheduler of random requests, whose steps several runners prepare."""

    def __init__(self, rng: random.Random, *runners: GPUModelRunner) -> None:
        self.rng, self.runners, self.block, self.names = rng, runners, 0, 0
        self.mode = CUDAGraphMode.FULL  # of decode steps
        self.resumed: set[str] = set()
        self.batches: list[tuple[InputBatch, dict]] = []  # prepared so far, and what they had then
        self.tokens: dict[str, tuple[int, int]] = {}  # of a request: those of its prompt, and those computed
        self.free = list(range(PLACES))

    def take(self, count: int) -> list[int]:
        self.block += count
        return list(range(self.block - count, self.block))

    def arrive(self, name: str, computed: int = 0) -> None:
        """A request, which may find some of its prompt computed; it has blocks for the first token after it."""
        length = self.rng.randint(computed + 1, 12)
        ids = torch.tensor([self.rng.randrange(1000) for _ in range(length)], dtype=torch.int32)
        place, blocks = self.free.pop(self.rng.randrange(len(self.free))), self.take(length // BLOCK_SIZE + 1)
        self.tokens[name] = length, computed
        for runner in self.runners:
            states = runner.req_states
            states.req_id_to_index[name] = place
            states.prefill_len.np[place] = states.prefill_len.gpu[place] = length
            states.all_token_ids.gpu[place, :length] = ids
            states.num_computed_tokens.gpu[place] = states.num_computed_tokens_np[place] = computed
            runner.block_tables.append(place, blocks, overwrite=True)

    def leave(self, name: str) -> None:
        del self.tokens[name]
        (place,) = {runner.req_states.req_id_to_index.pop(name) for runner in self.runners}
        self.free.append(place)

    def step(self, come: int = 0, go: int = 0, chunk: int = 12, back: bool = False, wait: bool = False) -> list[tuple]:
        """What each runner prepares for a step that `come` requests join and `go` leave.

        A prompt's tokens come `chunk` at a time.  back: who leaves joins again at once, as another request.  wait: one
        of the others has no token in this step.
        """
        leaving = self.rng.sample(sorted(self.tokens), min(go, len(self.tokens)))
        for name in leaving:
            self.leave(name)
        coming = [f"request {self.names + i}" for i in range(come)] + (leaving if back else [])
        self.names += come
        for name in coming:
            self.arrive(name, self.rng.randrange(3))
        if not self.tokens:
            return []
        new_blocks: list[list[list[int]] | None] = []
        scheduled = {}
        waiting = self.rng.choice(sorted(self.tokens)) if wait and len(self.tokens) > 1 else None
        for name, (length, computed) in self.tokens.items():
            if name == waiting and name not in coming:
                continue
            scheduled[name] = min(max(length - computed, 1), chunk)
            # Whose prompt ends with a block has had the next one: it gets all of its blocks before it needs them.
            grows = computed >= length and computed % BLOCK_SIZE == 0 and name not in coming
            place, blocks = self.runners[0].req_states.req_id_to_index[name], self.take(1)
            new_blocks.append([blocks] if grows else None)
            for runner in self.runners:
                states = runner.req_states
                states.num_computed_tokens_np[place] = computed
                if grows:
                    runner.block_tables.append(place, blocks, overwrite=False)
                np.minimum(states.num_computed_tokens_np, states.prefill_len.np, out=states.num_computed_prefill_tokens)
        cached = CachedRequestData.make_empty()
        cached.req_ids, cached.new_block_ids = list(scheduled), new_blocks
        cached.resumed_req_ids = self.resumed
        output = SimpleNamespace(
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            scheduled_new_reqs=coming,
            scheduled_cached_reqs=cached,
            scheduled_spec_decode_tokens={},
            has_structured_output_requests=self.rng.random() < 0.5,
        )
        prepared = [self.prepared(runner, copy(output)) for runner in self.runners]
        self.compute(scheduled)
        return prepared

    def prepared(self, runner: GPUModelRunner, output: SimpleNamespace) -> tuple:
        """All that a step reads: the batch, its buffers, block tables as far as tokens are cached, and slots."""
        state, _ = runner.gather_batch_req_state(output, dummy_run=False)
        decode = state.num_tokens == len(state.req_ids)
        padded = -(-len(state.req_ids) // 4) * 4 if decode else state.num_tokens
        mode = self.mode if decode else CUDAGraphMode.NONE
        graph = BatchExecutionDescriptor(mode, padded, padded if decode else None)
        named = {"batch_desc": graph, "num_active_loras": 0}  # or by their places
        given, named = ((), named) if len(self.batches) % 4 < 2 else (named.values(), {})
        batch = runner.prepare_inputs(output, state, *given, **named)
        self.batches.append((batch, vars(batch).copy()))
        tables, slots = runner.prepare_attn(batch)
        buffers = runner.input_buffers
        (table,) = tables
        ahead = torch.arange(WIDTH) * BLOCK_SIZE >= buffers.seq_lens[: len(table), None]
        return copied((vars(batch), buffers.query_start_loc, buffers.seq_lens, table.masked_fill(ahead, 0), slots))

    def compute(self, scheduled: dict[str, int]) -> None:
        """The step itself: the next tokens, and as many computed as were scheduled."""
        for name, count in scheduled.items():
            length, computed = self.tokens[name]
            self.tokens[name] = length, computed + count
            token = self.rng.randrange(1000)
            for runner in self.runners:
                place = runner.req_states.req_id_to_index[name]
                runner.req_states.num_computed_tokens.gpu[place] += count
                runner.req_states.last_sampled_tokens[place] = token


def copied(value: object) -> object:
    if isinstance(value, dict):
        return {name: copied(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(copied, value))
    return value.numpy().copy() if isinstance(value, torch.Tensor) else copy(value)


def assert_equal(ours: object, theirs: object) -> None:
    np.testing.assert_equal(ours, theirs)
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert type(a) is type(b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)


def leaves(value: object) -> list[object]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else None
    return [value] if parts is None else [leaf for part in parts for leaf in leaves(part)]
