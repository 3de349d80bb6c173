"""Steps that prompts have a part in, replayed from CUDA graphs: a short step is over before its kernels are launched.

vLLM's graphs of such steps end where attention begins.  Here attention reads its lengths on the GPU, so that one graph
has the whole step; a step is copied into the graph's inputs, with rows and tokens of padding behind its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

# Kernels change with every 16 tokens up to 64; beyond, a step costs about what its tokens do.
TOKENS = (16, 32, 48, 64, 96, *range(128, 257, 32), *range(320, 513, 64))
# In a longer step each kernel is launched while the one before it runs.  On an H200 Llama-3.2-1B's are so from some 400
# tokens on.  Llama-3.1-8B's all are while the host has nothing else to do, and what it has to do where it has waited
# meanwhile is worth less the longer they are, what padding costs more: a compromise (benchmarks/baseline.md).
MOST_TOKENS, MOST_TOKENS_OF_LARGE = 512, 128

Run = Callable[[], torch.Tensor]
Record = Callable[[Run], tuple[Callable[[], None], torch.Tensor]]  # what runs it again, and where its result is


class Graph(NamedTuple):
    """A step of so many tokens and requests: its inputs by name, its replay, and hidden states [tokens, D]."""

    tokens: int
    requests: int
    inputs: dict[str, torch.Tensor]
    replay: Callable[[], None]
    hidden: torch.Tensor


class PromptGraphs:
    """Graphs of steps of which a request may have several tokens.

    Args:
        forward: runs a step; its arguments are those of `Program.forward`, caches and observer left out.
        most_tokens, most_requests: of a step that is replayed; there is no graph for a step of one token.
        table_width: blocks of a request at most.
        device: where the step runs.
        record: makes a graph of what it is given, with nothing in the inputs but padding.
    """

    def __init__(
        self,
        forward: Callable[..., torch.Tensor],
        most_tokens: int,
        most_requests: int,
        table_width: int,
        device: torch.device,
        record: Record,
    ) -> None:
        self._inputs = _padding(most_tokens, _requests(most_tokens, most_requests), table_width, device)
        self._graphs: list[Graph] = []
        sizes = {most_tokens, *(size for size in TOKENS if size < most_tokens)} - {1}
        for tokens in sorted(sizes, reverse=True):
            requests = _requests(tokens, most_requests)
            inputs = _first(self._inputs, tokens, requests)
            # The largest first: memory that it has is enough for the others.
            self._graphs.insert(0, Graph(tokens, requests, inputs, *record(partial(forward, **inputs))))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor | None:
        """Hidden states [T, D], valid until the next step, as `Program.forward` gives; None if no graph has room."""
        tokens, requests = input_ids.shape[0], seq_lens.shape[0]
        graph = next((graph for graph in self._graphs if tokens <= graph.tokens), None)
        if graph is None or requests > graph.requests:
            return None
        inputs, width = graph.inputs, min(block_table.shape[1], graph.inputs["block_table"].shape[1])
        inputs["input_ids"][:tokens].copy_(input_ids)
        inputs["positions"][:tokens].copy_(positions)
        inputs["slot_mapping"][:tokens].copy_(slot_mapping)
        inputs["slot_mapping"][tokens:].fill_(-1)
        inputs["block_table"][:requests, :width].copy_(block_table[:, :width])
        inputs["seq_lens"][:requests].copy_(seq_lens)
        inputs["seq_lens"][requests:].zero_()
        inputs["query_start_loc"][: requests + 1].copy_(query_start_loc)
        inputs["query_start_loc"][requests + 1 :].copy_(query_start_loc[-1:])
        graph.replay()
        return graph.hidden[:tokens]


def longest_worthwhile(host_bound: bool) -> int:
    """Tokens of the longest step that is worth a graph; `host_bound` is a model whose decode waits for the host."""
    return MOST_TOKENS if host_bound else MOST_TOKENS_OF_LARGE


def cuda_graphs() -> Record:
    """Records CUDA graphs that share their memory, so that one is replayed at a time."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Run) -> tuple[Callable[[], None], torch.Tensor]:
        run()  # what kernels and libraries need once, they get here
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = run()
        return graph.replay, result

    return record


def _requests(tokens: int, most: int) -> int:
    """Requests of a step: fewer than tokens, else the program would take it for one that decodes."""
    return min(tokens - 1, most)


def _padding(tokens: int, requests: int, width: int, device: torch.device) -> dict[str, torch.Tensor]:
    """A step of no request and tokens that are not cached, by the names that `Program.forward` has."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return {
        "input_ids": zeros(tokens),
        "positions": zeros(tokens, dtype=torch.int64),
        "block_table": zeros(requests, width),
        "seq_lens": zeros(requests),
        "query_start_loc": zeros(requests + 1),
        "slot_mapping": zeros(tokens, dtype=torch.int64) - 1,
    }


def _first(inputs: Mapping[str, torch.Tensor], tokens: int, requests: int) -> dict[str, torch.Tensor]:
    """The inputs of a smaller step, in the same memory."""
    counts = {"block_table": requests, "seq_lens": requests, "query_start_loc": requests + 1}
    return {name: tensor[: counts.get(name, tokens)] for name, tensor in inputs.items()}
