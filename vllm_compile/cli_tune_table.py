"""What `vllm-compile tune` shows: how far the tasks are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .schedules.tuning.search import Progress

console = Console(stderr=True)
NAME_WIDTH = 12  # of the table's first column at least, on a narrow terminal


def say_how_long(work: Sequence[Progress], bandwidth: float) -> None:
    from .schedules.tuning.search import time_left

    left = time_left(work, bandwidth, spent=0.0)
    verbs = " or ".join(sorted({progress.task.method for progress in work}))
    console.print(f"about {left / 60:.0f} minutes to {verbs} what is not known yet", highlight=False)


def table(work: Sequence[Progress], left: float | None = None) -> Table:
    """What is known of each task, and how many seconds are left; µs and rates are of the fewest tokens."""
    table = Table(
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,
        caption=None if left is None else f"about {left / 60:.1f} minutes left",
    )
    table.add_column("weight", overflow="fold", min_width=NAME_WIDTH)
    for title in ("calls", "", "tried", "wrong", "failed", "µs", "GB/s", "roofline", "gain"):
        table.add_column(title)
    for progress in work:
        task = progress.task
        best = (f"{progress.best_us:.1f}", f"{progress.gb_per_s:.0f}", f"{progress.roofline_share:.0%}")
        table.add_row(
            ", ".join(task.names),
            str(task.calls),
            progress.state,
            f"{progress.tried}/{sum(len(r.configs) for r in task.ranges)}",
            *(str(count) if count else "" for count in (progress.wrong, progress.failed)),
            *((*best, f"{progress.gain():.2f}x") if progress.state == "done" else ()),
        )
    return table


def answer(options: argparse.Namespace, work: Sequence[Progress]) -> int:
    failed = [progress for progress in work if progress.state == "failed"]
    if options.json:
        summary = [
            {
                "weights": progress.task.names,
                "state": progress.state,
                "candidates": sum(len(r.configs) for r in progress.task.ranges),
                "tried": progress.tried,
                "wrong": progress.wrong,
                "failed": progress.failed,
                "reason": progress.reason,
                "speedups": progress.speedups,
                "best_us": progress.best_us,
                "gb_per_s": progress.gb_per_s,
                "roofline_share": progress.roofline_share,
            }
            for progress in work
        ]
        print(json.dumps({"tasks": summary}))
    for progress in failed:
        names = ", ".join(progress.task.names)
        console.print(f"[red]failed:[/red] {names}: {progress.reason}", highlight=False)
    return 1 if failed else 0
