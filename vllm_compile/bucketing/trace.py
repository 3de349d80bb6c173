"""A trace of requests, and the shapes of the steps in which a scheduler serves it.

The scheduler is vLLM's in outline: each step first gives every running request its next token, then spends what is left
of `max_tokens` on prompts in the order of their arrival, in chunks.  As in `runtime/padded_steps.py`, the requests that
have one token run as one batch, be it the last of a prompt, and each longer chunk of a prompt as a batch of its own.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vllm_compile.errors import BucketError
from vllm_compile.runtime.buckets import Bucket, Limits
from vllm_compile.whole_file import write_whole


class Request(NamedTuple):
    """`step` is the step before which it arrives."""

    step: int
    prompt: int
    output: int


@dataclass
class _Running:
    request: Request
    cached: int = 0

    @property
    def length(self) -> int:
        """Tokens that are fed: all but the last of the output."""
        return self.request.prompt + self.request.output - 1


def steps_of(requests: Sequence[Request], limits: Limits) -> Counter[Bucket]:
    """How often each shape of a step occurs while the requests are served.

    Raises:
        BucketError: a request does not fit the limits.
    """
    for number, request in enumerate(requests, 1):
        if min(request.prompt, request.output) < 1 or request.prompt + request.output > limits.max_length:
            raise BucketError(
                f"request {number} has {request.prompt} + {request.output} tokens; the server takes from 1 + 1 "
                f"to {limits.max_length} in all"
            )
        if (blocks := limits.blocks(_Running(request).length)) > limits.cache_blocks:
            raise BucketError(f"request {number} takes {blocks} KV blocks; the cache has {limits.cache_blocks} in all")
    waiting, running = deque(sorted(requests)), list[_Running]()
    shapes: Counter[Bucket] = Counter()
    step = 0
    while waiting or running:
        if not running:
            step = max(step, waiting[0].step)
        reserved = sum(limits.blocks(r.length) for r in running)
        while waiting and waiting[0].step <= step and len(running) < limits.max_requests:
            reserved += limits.blocks(_Running(waiting[0]).length)
            if reserved > limits.cache_blocks and running:
                break
            running.append(_Running(waiting.popleft()))
        _one_step(running, limits, shapes)
        running = [r for r in running if r.cached < r.length]
        step += 1
    return shapes


def _one_step(running: Sequence[_Running], limits: Limits, shapes: Counter[Bucket]) -> None:
    decoding = [r for r in running if r.cached >= r.request.prompt]
    budget = limits.max_tokens - len(decoding)
    single = list(decoding)  # requests with one token in this step
    for r in running:
        chunk = min(budget, r.request.prompt - r.cached)
        if chunk == 1:
            single.append(r)
        elif chunk > 1:
            shapes[Bucket(1, chunk, limits.blocks(r.cached))] += 1
            r.cached += chunk
        budget -= max(chunk, 0)
    for r in single:
        r.cached += 1
    if single:
        shapes[Bucket(len(single), 1, sum(limits.blocks(r.cached) for r in single))] += 1


def read_trace(path: Path) -> list[Request]:
    """The requests of a trace file: {"about": …, "requests": [[step, prompt, output], …]}.

    Raises:
        BucketError: there is no such file, or it is no trace.
    """
    try:
        rows = json.loads(path.read_text())["requests"]
        return [Request(*map(int, row)) for row in rows]
    except OSError as error:
        raise BucketError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BucketError(f"{path}: not a trace of requests ({error!r})") from error


def write_trace(path: Path, about: str, requests: Sequence[Request]) -> None:
    """Write a trace file; `about` says what it is of.

    Raises:
        BucketError: it cannot be written.
    """
    rows = ",\n  ".join(json.dumps(list(request)) for request in requests)
    try:
        write_whole(path, f'{{"about": {json.dumps(about)},\n "requests": [\n  {rows}\n ]}}\n')
    except OSError as error:
        raise BucketError(f"{path}: cannot be written ({error.strerror})") from error
