"""`vllm-compile bench`: an artifact beside its peers, as a table."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .bench_worker import PEERS
from .cli_values import pair_of, pairs_of, positive, positives

console = Console(stderr=True)

LOG_COLUMNS = 120  # at least, where there is no terminal
INTERRUPTED = 130  # what shells say of SIGINT


def add_bench(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "bench",
        help="time an artifact beside its peers",
        epilog="Interrupted with Ctrl+C, it prints the figures of the rounds that all engines have done.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--model", type=Path, metavar="DIR", help="what it was compiled from (not for dummy weights)")
    parser.add_argument("--against", type=_names, default=["vllm"], help=f"of: {','.join(PEERS)} (default: vllm)")
    parser.add_argument("--batch", type=positives, default=[1, 8, 16], help="batch sizes to decode (default: 1,8,16)")
    parser.add_argument("--context", type=positive, default=128, help="tokens of each prompt then (default: 128)")
    parser.add_argument(
        "--decode",
        type=_mixed_workloads,
        default=[],
        metavar="BxN[+BxN],...",
        help="further decodes: batch x tokens of a prompt; of several lengths in one batch with +",
    )
    parser.add_argument(
        "--prefill",
        type=_mixed_workloads,
        default=[[(1, 1024)]],
        metavar="BxN[+BxN],...",
        help="prompts to prefill (default: 1x1024)",
    )
    parser.add_argument(
        "--serve",
        type=_workloads,
        default=[],
        metavar="NxL,...",
        help="loads: requests that are all there from the start, prompts and answers of 1 to L tokens, drawn; "
        "as many run at a time as the largest batch has",
    )
    parser.add_argument("--repeats", type=positive, default=5, help="counted rounds (default: 5)")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="one engine after the other, started anew for each round: where memory holds only one",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="decode steps that are timed, after N that are not (default: 16 on a CPU, 80 on a GPU)",
    )
    parser.add_argument("--json", action="store_true", help="all figures as the last line of stdout")
    parser.set_defaults(run=_bench)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"unknown engine {', '.join(sorted(unknown))}; of {', '.join(PEERS)}")
    return list(dict.fromkeys(names))


def _workloads(text: str) -> list[tuple[int, int]]:
    """`4x4096,1x128` as pairs."""
    return [pair_of(item) for item in text.split(",")]


def _mixed_workloads(text: str) -> list[list[tuple[int, int]]]:
    """`4x4096,63x128+1x30000` as pairs, those of one batch together."""
    return [pairs_of(item) for item in text.split(",")]


def _bench(options: argparse.Namespace) -> int:
    from .bench import bench
    from .bench_workloads import Workload

    decodes = [Workload(batch, options.context) for batch in options.batch]
    decodes += map(Workload.of, options.decode)
    prefills, serves = list(map(Workload.of, options.prefill)), [Workload(*pair) for pair in options.serve]
    if not console.is_terminal:
        console.width = max(console.width, LOG_COLUMNS)
    with console.status("starting") as status:
        figures = bench(
            options.artifact,
            options.model,
            options.against,
            decodes,
            prefills,
            options.repeats,
            serves,
            options.alone,
            options.steps,
            status.update if console.is_terminal else console.print,
        )
    title = ("interrupted: " if figures["interrupted"] else "") + figures["device"]
    title += f", medians of {figures['rounds']}; torch reads memory at {figures['bandwidth']:.1f} GB/s"
    table = Table("workload", title=title)
    for column in ("engine", "ms", "quartiles", "tokens/s", "GB/s", "of reads", "compiled"):
        table.add_column(column, no_wrap=column in ("ms", "compiled"), overflow="fold")
    for row in figures["rows"]:
        reads = (
            [f"{row.gigabytes_per_second:.1f}", f"{row.bandwidth_share:.0%}"] if row.workload == "decode" else ["", ""]
        )
        figures_of = [
            f"{row.milliseconds:.3f}",
            "-".join(f"{quartile:.3f}" for quartile in row.quartiles),
            f"{row.tokens_per_second:.1f}",
            *reads,
            f"{row.speedup:.2f}x",
        ]
        table.add_row(f"{row.workload} {row.requests}", row.engine, *figures_of)
    console.print(table)
    loads, first = _starts(figures["load_seconds"]), _starts(figures["first_token_seconds"])
    console.print(f"engines loaded in: {loads}; first token after: {first}")
    if options.json:
        print(json.dumps({**figures, "rows": [asdict(row) for row in figures["rows"]]}))
    return INTERRUPTED if figures["interrupted"] else 0


def _starts(seconds: dict[str, list[float]]) -> str:
    """`compiled 20.9 s, 20.8 s; vllm 47.0 s, 46.1 s`."""
    return "; ".join(f"{name} {', '.join(f'{start:.1f} s' for start in starts)}" for name, starts in seconds.items())
