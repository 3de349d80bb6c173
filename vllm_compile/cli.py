"""The command line: `vllm-compile compile | analyze | tune | verify | bench | buckets | cache | db | worker`.

Everything for people goes to stderr; with --json the last line of stdout is a summary for
programs.  Errors that a user can act on are one line and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .cli_analyze import add_analyze
from .cli_bench import add_bench
from .cli_buckets import add_buckets
from .cli_cache import add_cache, add_cache_options, cache_of
from .cli_database import add_database
from .cli_tune import add_tune
from .cli_worker import add_worker
from .errors import VllmCompileError

console = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 compared and found wanting, 2 an error, 130 interrupted."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    try:
        return options.run(options)
    except VllmCompileError as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-compile", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_compile(commands)
    add_analyze(commands)
    add_tune(commands)
    _add_verify(commands)
    add_bench(commands)
    add_buckets(commands)
    add_cache(commands)
    add_database(commands)
    add_worker(commands)
    return parser


def _add_compile(commands: Any) -> None:
    parser = commands.add_parser("compile", help="compile a model into an artifact")
    models = "Hugging Face model directory; or an ONNX file, or its directory"
    parser.add_argument("--model", type=Path, required=True, metavar="DIR|ONNX", help=models)
    parser.add_argument("--target", default="cpu", help="what to compile for (default: cpu)")
    parser.add_argument("--out", type=Path, required=True, metavar="ARTIFACT", help="directory to write")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the model's own")
    parser.add_argument("--strict", action="store_true", help="a pass that matches nothing is an error")
    parser.add_argument(
        "--dummy-weights",
        nargs="?",
        type=int,
        const=0,
        metavar="SEED",
        help="random Gaussian weights from a seed",
    )
    parser.add_argument(
        "--pack",
        choices=("lossless", "none"),
        default="lossless",
        help="weights in 12 bits, every bit restored, where the target's kernels read them so (default: lossless)",
    )
    parser.add_argument(
        "--weightless", action="store_true", help="leave the weights out; serve with vLLM's --load-format dummy"
    )
    parser.add_argument("--db", metavar="URL", help="tuning database to take configurations of kernels from")
    parser.add_argument(
        "--buckets", type=Path, metavar="FILE", help="shapes to have graphs of (targets gaudi2, gaudi3)"
    )
    add_cache_options(parser)
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write the module after each pass as TVMScript")
    parser.add_argument("--json", action="store_true", help="a summary as the last line of stdout")
    parser.set_defaults(run=_compile)


def _compile(options: argparse.Namespace) -> int:
    from .compilation import CompileOptions
    from .unchanged import compile_if_changed

    settings = CompileOptions(
        options.dtype,
        options.strict,
        options.dummy_weights,
        options.dump,
        options.pack,
        options.weightless,
        options.db,
        options.buckets,
    )
    with console.status("starting") as status:
        result = compile_if_changed(
            options.model, options.target, options.out, settings, status.update, cache_of(options)
        )
    _print_result(result)
    if options.json:
        print(json.dumps(asdict(result), default=str))
    return 1 if result.verdict["outcome"] == "fail" else 0


def _print_result(result: Any) -> None:
    passes = Table("pass", "matches", title="passes")
    for record in result.passes:
        passes.add_row(record.name, str(record.matches))
    console.print(passes)
    console.print(_kernel_table(result.kernels))
    for warning in result.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}")
    if result.unchanged:
        console.print(f"unchanged: {result.artifact} was made from this model, with these options", soft_wrap=True)
    else:
        cached = len(result.kernels) - result.built
        console.print(f"kernels: {result.built} compiled, {cached} from the cache")
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    console.print(f"{stages}; total {sum(result.seconds.values()):.1f} s")
    console.print(f"verified: {_verdict(result.verdict)}")
    done = "kept" if result.unchanged else "wrote"
    console.print(f"{done} {result.artifact}; serve it with: vllm serve {result.artifact}", soft_wrap=True)


def _kernel_table(kernels: list[dict[str, Any]]) -> Table:
    """One row per call of an operator, its variants side by side."""
    table = Table("operator", "family", "inputs", "variants from T", "µs", title="kernels")
    calls: dict[str, list[dict[str, Any]]] = {}
    for kernel in kernels:
        calls.setdefault(json.dumps([kernel["op"], kernel["family"], kernel["inputs"]]), []).append(kernel)
    for variants in calls.values():
        first = variants[0]
        inputs = ", ".join(f"{name} {'x'.join(shape[:-1])}" for name, shape in first["inputs"].items())
        minimums = " ".join(str(kernel["min_tokens"]) for kernel in variants)
        times = [f"{k['min_tokens']}: {k['microseconds']:.0f}" for k in variants if k["microseconds"] is not None]
        table.add_row(first["op"], first["family"], inputs, minimums, "  ".join(times))
    return table


def _verdict(verdict: dict[str, Any]) -> str:
    if "reason" in verdict:
        return f"{verdict['outcome']} ({verdict['reason']})"
    right = verdict.get("greedy")  # which artifacts made earlier do not tell
    wrong = "" if right in (None, 1.0) else f"; its own choice of tokens is right in {right:.1%}"
    return (
        f"{verdict['outcome']} (error against fp32 {verdict['error']:.2e}, "
        f"Hugging Face's {verdict['reference_error']:.2e}; "
        f"KL {verdict['kl']:.2e} against {verdict['reference_kl']:.2e}; "
        f"agreement {verdict['agreement']:.1%}{wrong})"
    )


def _add_verify(commands: Any) -> None:
    parser = commands.add_parser("verify", help="compare an artifact with the model it was made from")
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face model directory")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts")
    parser.add_argument("--json", action="store_true", help="the report as the last line of stdout")
    parser.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from .runtime.manifest import check_files, check_machine, read_manifest
    from .verify import verify

    manifest = read_manifest(options.artifact)
    check_machine(options.artifact, manifest)
    check_files(options.artifact, manifest)
    target, dummy_seed = manifest["target"]["name"], manifest["source"]["dummy_weights_seed"]
    with console.status("comparing with Hugging Face"):
        report = verify(options.artifact, options.model, target, dummy_seed, seed=options.seed)
    table = Table("layer", "relative error", title="each layer on Hugging Face's input")
    for layer, error in enumerate(report.layers):
        table.add_row("final norm" if layer == len(report.layers) - 1 else str(layer), f"{error:.2e}")
    console.print(table)
    console.print(_verdict({"outcome": "pass" if report.passed else "fail", **asdict(report)}))
    if options.json:
        print(json.dumps(asdict(report)))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
