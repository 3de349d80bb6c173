"""`vllm-compile analyze`: what a model will cost on a chip, from its configuration alone."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .cli_values import positives
from .errors import ArtifactError
from .quantities import binary, count, duration

if TYPE_CHECKING:
    from .analysis.analyze import Analysis
    from .analysis.figures import StepFigures

console = Console(stderr=True)

MOST_OPS = 8  # of a step's operators, those that take longest


def add_analyze(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("analyze", help="predict what a model costs, without weights or hardware")
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR|CONFIG|ONNX",
        help="Hugging Face model directory, or its config.json; or an ONNX file, or its directory",
    )
    parser.add_argument("--target", default="cpu", help="what it would be compiled for (default: cpu)")
    parser.add_argument(
        "--chip", help="of the target: h200 or h100 for cuda (default: h200; others have one; of a CPU: this machine's)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the model's own")
    parser.add_argument(
        "--batch", type=positives, default=[1, 64], metavar="N,...", help="requests at once (default: 1,64)"
    )
    parser.add_argument(
        "--context", type=positives, default=[1024], metavar="N,...", help="tokens of each request (default: 1024)"
    )
    parser.add_argument(
        "--pack", choices=("lossless", "none"), default="lossless", help="as `compile` is told (default: lossless)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    parser.add_argument("--json", action="store_true", help="all figures as the last line of stdout")
    parser.set_defaults(run=_analyze)


def _analyze(options: argparse.Namespace) -> int:
    from .analysis.analyze import analyze
    from .analysis.report import render

    with console.status("analysing"):
        analysis = analyze(
            options.model, options.target, options.batch, options.context, options.chip, options.dtype, options.pack
        )
    _print(analysis)
    if options.html:
        try:
            options.html.write_text(render(analysis))
        except OSError as error:
            raise ArtifactError(f"{options.html}: cannot be written ({error.strerror})") from error
        console.print(f"wrote {options.html}", soft_wrap=True)
    if options.json:
        print(json.dumps(analysis.to_json()))
    return 0


def _print(analysis: Analysis) -> None:
    model, chip = analysis.model, analysis.chip
    console.print(
        f"{model['name']} ({model['type']}, {count(analysis.parameters)} parameters, {model['dtype']}) on {chip.name}",
        markup=False,
        highlight=False,
    )
    console.print(", ".join(f"{number} {name}" for name, number in analysis.blocks.items() if number), highlight=False)
    console.print(_step_table(analysis))
    for step in _first_of_each_phase(analysis):
        console.print(_op_table(step))
        console.print(_saving_table(step))
    for warning in analysis.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False, soft_wrap=True)


def _first_of_each_phase(analysis: Analysis) -> list[StepFigures]:
    return list({step.phase: step for step in reversed(analysis.steps)}.values())[::-1]


def _step_table(analysis: Analysis) -> Table:
    table = Table(
        "phase",
        "batch",
        "context",
        "bound",
        "predicted",
        "library, plain",
        "tokens/s",
        "memory",
        "scores untiled",
        "bound by",
    )
    for step in analysis.steps:
        fits = step.memory_bytes <= analysis.chip.memory_bytes
        by_library = "" if step.library_ms is None else duration(step.library_ms * 1e-3)
        table.add_row(
            step.phase,
            str(step.batch),
            f"{step.context:,}",
            duration(step.bound_ms * 1e-3),
            duration(step.predicted_ms * 1e-3),
            by_library,
            f"{step.tokens_per_second:,.0f}",
            binary(step.memory_bytes) + ("" if fits else " [red]too large[/red]"),
            binary(step.score_bytes),
            f"{max(step.shares, key=step.shares.__getitem__)} {max(step.shares.values()):.0%}",
        )
    return table


def _op_table(step: StepFigures) -> Table:
    title = f"{step.phase}, {step.batch} x {step.context:,}: operators that take longest, figures of one call"
    table = Table(
        "operator", "calls", "FLOPs", "weights", "KV", "activations", "FLOP/byte", "predicted", "share", title=title
    )
    longest = sorted(step.ops, key=lambda op: op.predicted_us * op.times, reverse=True)
    for op in longest[:MOST_OPS]:
        table.add_row(
            op.label,
            str(op.times),
            count(op.flops),
            binary(op.weight_bytes),
            binary(op.kv_bytes),
            binary(op.activation_bytes),
            f"{op.intensity:.3g}",
            f"{duration(op.predicted_us * 1e-6)}, {op.bound}",
            f"{op.predicted_us * op.times / step.predicted_ms / 1e3:.1%}",
        )
    return table


def _saving_table(step: StepFigures) -> Table:
    table = Table("saved by", "launches", "bytes", "time", "", title=f"{step.phase}, {step.batch} x {step.context:,}")
    for saving in step.savings:
        table.add_row(saving.what, str(saving.kernels), binary(saving.bytes), duration(saving.seconds), saving.note)
    return table
