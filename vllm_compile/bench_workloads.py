"""What engines of a benchmark are asked for, and what of it counts: decode steps, prefill, and loads that are served.

A decode step is the difference between generating 1 + 2n tokens and generating 1 + n, divided by n, once the prompts
are in the engine's prefix cache (which vLLM has by default; `hf` has none).  Admitting requests, in steps that do not
only decode, is in both.  Prefill is what generating one token takes, of prompts that were never seen before.  Serving
is a whole load: more requests than are run at a time, whose prompts and answers are of any length, so that they come
and go, and many steps have prompts, or parts of them, among requests that decode.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .bench_engine import Engine
from .runtime.plan import Plan

KINDS = ("decode", "prefill", "serve")


@dataclass(frozen=True)
class Workload:
    """`batch` requests of `length` tokens each, decoded further or prefilled at once; of up to so many, if served.

    `beside` are further ones, of another length, in the same batch.
    """

    batch: int
    length: int
    beside: Workload | None = None

    @staticmethod
    def of(parts: Sequence[tuple[int, int]]) -> Workload:
        """Of (requests, tokens of each) in one batch."""
        (batch, length), *rest = parts
        return Workload(batch, length, Workload.of(rest) if rest else None)

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}" + (f"+{self.beside}" if self.beside is not None else "")

    @property
    def lengths(self) -> list[int]:
        """Of each request."""
        return [self.length] * self.batch + (self.beside.lengths if self.beside is not None else [])

    def within(self, most: int) -> Workload:
        """The same, of no more tokens a request."""
        beside = self.beside and self.beside.within(most)
        return Workload(self.batch, min(self.length, most), beside)


def interleaved(
    engines: list[Engine], vocabulary: int, rounds: Sequence[int], kind: str, workload: Workload, steps: int
) -> Iterator[dict[str, float]]:
    """Seconds by engine in each of `rounds`, on random prompts that no other workload or round has.

    A round 0 before them warms up and is not counted.
    """
    lengths = served_lengths(workload)[0] if kind == "serve" else workload.lengths
    for number in (0, *rounds):
        draw = random.Random(f"{kind} {workload} {number}")
        prompts = [draw.choices(range(vocabulary), k=length) for length in lengths]
        seconds = {}
        for engine in engines:
            for other in engines:
                if other is not engine:
                    other.rest()
            seconds[engine.name] = _seconds(engine, kind, workload, prompts, steps)
        if number:
            yield seconds


def served_lengths(workload: Workload) -> tuple[list[int], list[int]]:
    """Tokens of each prompt, and of each answer, of a load: drawn once, so that all rounds have as many."""
    draw = random.Random(str(workload))
    prompts, answers = ([draw.randint(1, workload.length) for _ in range(workload.batch)] for _ in range(2))
    return prompts, answers


def tokens_of(kind: str, workload: Workload) -> int:
    """Tokens that a workload's time is of: one of each request, those of all prompts, or those of all answers."""
    if kind == "serve":
        return sum(served_lengths(workload)[1])
    return sum(workload.lengths) if kind == "prefill" else len(workload.lengths)


def step_bytes(plan: Plan, contexts: Sequence[int]) -> int:
    """Bytes a decode step must read: every stored weight but the tables, and each request's cached tokens."""
    entries = [plan.functions[name] for name in ("forward", "logits")]
    tables = {s.arguments[1].buffer for s in entries[0].steps if getattr(s, "op", None) == "embedding"}
    weights = {a.buffer: a.spec.nbytes() for f in entries for a in f.weights}
    read = sum(size for name, size in weights.items() if name not in tables and name not in plan.restored)
    model = plan.model
    cached = model.num_layers * model.num_kv_heads * model.cache_width * getattr(torch, model.dtype).itemsize
    return read + sum(contexts) * cached


def _seconds(engine: Engine, kind: str, workload: Workload, prompts: list[list[int]], steps: int) -> float:
    """Of a decode step, of the whole prefill, or until all are served."""
    if kind == "serve":
        return engine.seconds(prompts, served_lengths(workload)[1])

    def generating(new_tokens: int) -> float:
        return engine.seconds(prompts, [new_tokens] * len(prompts))

    first = generating(1)  # which fills the prefix cache
    if kind == "prefill":
        return first
    shorter = generating(1 + steps)
    return (generating(1 + 2 * steps) - shorter) / steps
