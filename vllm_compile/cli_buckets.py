"""The command line of bucket plans: `vllm-compile buckets plan | prune | compare`; see docs/buckets.md."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .cli_values import positives
from .errors import BucketError

if TYPE_CHECKING:
    from .bucketing.padding import Padding
    from .runtime.buckets import Bucket, Limits

console = Console(stderr=True)

# Llama-3.1-8B in bfloat16 on a Gaudi 2 at its peaks (targets/gaudi.py), in microseconds: 2 * 8.03e9 FLOPs a token at
# 432 TFLOP/s, and 128 tokens of 131,072 bytes a block at 2.46 TB/s.
TOKEN_US, BLOCK_US = 37.2, 6.8


def add_buckets(commands: Any) -> None:
    """Add `buckets` and its commands."""
    parser = commands.add_parser("buckets", help="plan which shapes a Gaudi has graphs of")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def add(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=help)
        action.add_argument("--trace", type=Path, required=True, metavar="FILE", help="requests to plan for")
        for option, default, what in (
            ("max-num-seqs", 64, "requests at once"),
            ("max-num-batched-tokens", 2048, "tokens of a step"),
            ("max-model-len", 4096, "tokens of a request"),
            ("block-size", 128, "tokens of a KV block"),
            ("cache-blocks", 4000, "KV blocks in all"),
        ):
            action.add_argument(f"--{option}", type=int, default=default, metavar="N", help=f"{what} ({default})")
        action.add_argument("--token-us", type=float, default=TOKEN_US, help=f"work of a token ({TOKEN_US} us)")
        action.add_argument("--block-us", type=float, default=BLOCK_US, help=f"work of a KV block ({BLOCK_US} us)")
        action.set_defaults(run=run)
        return action

    plan = add("plan", _plan, "write a bucket file")
    plan.add_argument("--budget", type=int, required=True, metavar="N", help="graphs to warm up at most")
    plan.add_argument("--out", type=Path, required=True, metavar="FILE")
    prune = add("prune", _prune, "leave out the buckets that a trace does not use, but for the largest")
    prune.add_argument("buckets", type=Path, metavar="FILE", help="bucket file")
    prune.add_argument("--out", type=Path, required=True, metavar="FILE")
    compare = add("compare", _compare, "a table: this planner beside vLLM-Gaudi's rules")
    compare.add_argument("--held-out", type=Path, action="append", default=[], metavar="FILE", help="another trace")
    compare.add_argument(
        "--budget", type=positives, default=[], metavar="N,...", help="default: 1/4, 1/2 and all of theirs"
    )


def _limits(options: argparse.Namespace) -> Limits:
    from .runtime.buckets import Limits

    return Limits(
        options.max_num_seqs,
        options.max_num_batched_tokens,
        options.max_model_len,
        options.block_size,
        options.cache_blocks,
    )


def _plan(options: argparse.Namespace) -> int:
    from .bucketing.padding import padding_of
    from .bucketing.plan import plan_buckets
    from .bucketing.trace import read_trace, steps_of
    from .runtime.buckets import Work

    limits, work = _limits(options), Work(options.token_us, options.block_us)
    steps = steps_of(read_trace(options.trace), limits)
    plan = plan_buckets(steps, limits, work, options.budget)
    plan.write(options.out)
    padding = padding_of(plan.find, steps, work)
    made = f"{len(plan.buckets)} buckets, {padding.work:.1%} of padding on the trace"
    console.print(f"wrote {options.out}: {made}", soft_wrap=True)
    return 0


def _prune(options: argparse.Namespace) -> int:
    from .bucketing.padding import padding_of
    from .bucketing.trace import read_trace, steps_of
    from .runtime.buckets import read_buckets

    limits, plan = _limits(options), read_buckets(options.buckets)
    if plan.block_size != limits.block_size:
        raise BucketError(
            f"{options.buckets}: for KV blocks of {plan.block_size} tokens, not {limits.block_size}: "
            f"pass --block-size {plan.block_size}"
        )
    padding = padding_of(plan.find, steps_of(read_trace(options.trace), limits), plan.work)
    pruned = plan.prune(padding.used)
    pruned.write(options.out)
    made = f"{len(pruned.buckets)} of {len(plan.buckets)} buckets{_missed(padding)}"
    console.print(f"wrote {options.out}: {made}", soft_wrap=True)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from .bucketing.padding import padding_of
    from .bucketing.plan import plan_buckets
    from .bucketing.trace import read_trace, steps_of
    from .bucketing.vllm_gaudi import exponential_buckets, first_cover, linear_buckets
    from .runtime.buckets import Work

    limits, work = _limits(options), Work(options.token_us, options.block_us)
    paths = [options.trace, *options.held_out]
    traces = [steps_of(read_trace(path), limits) for path in paths]
    exponential, linear = exponential_buckets(limits), linear_buckets(limits)
    rules: list[tuple[str, int, Callable[[Bucket], Bucket | None]]] = [
        ("vLLM-Gaudi, exponential (default)", len(exponential), lambda step: first_cover(exponential, step)),
        ("vLLM-Gaudi, linear", len(linear), lambda step: first_cover(linear, step)),
    ]
    for budget in options.budget or [len(exponential) // 4, len(exponential) // 2, len(exponential)]:
        plan = plan_buckets(traces[0], limits, work, budget)
        rules.append(("planned", len(plan.buckets), plan.find))
    stems = [path.stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else list(map(str, paths))
    names[1:] = [f"{name} (held out)" for name in names[1:]]
    print("| buckets | graphs |", " | ".join(f"{name}: work, tokens, blocks" for name in names), "|")
    print("|---" * (2 + len(traces)) + "|")
    for name, graphs, find in rules:
        cells = [_cell(padding_of(find, steps, work)) for steps in traces]
        print(f"| {name} | {graphs} |", " | ".join(cells), "|")
    return 0


def _cell(padding: Padding) -> str:
    return f"{padding.work:.1%}, {padding.tokens:.1%}, {padding.blocks:.1%}{_missed(padding)}"


def _missed(padding: Padding) -> str:
    return f"; {padding.missed} shapes without a graph" if padding.missed else ""
