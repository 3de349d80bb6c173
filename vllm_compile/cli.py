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

from .bench_worker import PEERS
from .cli_analyze import add_analyze
from .cli_buckets import add_buckets
from .cli_cache import add_cache, add_cache_options, cache_of
from .cli_database import add_database
from .cli_tune import add_tune
from .cli_tune_options import positive
from .cli_worker import add_worker
from .errors import VllmCompileError

console = Console(stderr=True)
INTERRUPTED = 130  # what shells say of SIGINT


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
    _add_bench(commands)
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


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time an artifact beside its peers",
        epilog="Interrupted with Ctrl+C, it prints the figures of the rounds that all engines have done.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--model", type=Path, metavar="DIR", help="what it was compiled from (not for dummy weights)")
    parser.add_argument("--against", type=_names, default=["vllm"], help=f"of: {','.join(PEERS)} (default: vllm)")
    parser.add_argument("--batch", type=_numbers, default=[1, 8, 16], help="batch sizes to decode (default: 1,8,16)")
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt then (default: 128)")
    parser.add_argument(
        "--decode", type=_workloads, default=[], metavar="BxN,...", help="further decodes: batch x tokens of a prompt"
    )
    parser.add_argument(
        "--prefill",
        type=_workloads,
        default=[(1, 1024)],
        metavar="BxN,...",
        help="prompts to prefill (default: 1x1024)",
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


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _workloads(text: str) -> list[tuple[int, int]]:
    """`4x4096,1x128` as pairs."""
    return [(int(batch), int(length)) for batch, _, length in (item.partition("x") for item in text.split(","))]


def _bench(options: argparse.Namespace) -> int:
    from .bench import Workload, bench

    decodes = [Workload(batch, options.context) for batch in options.batch]
    decodes += [Workload(*pair) for pair in options.decode]
    prefills = [Workload(*pair) for pair in options.prefill]
    with console.status("starting") as status:
        figures = bench(
            options.artifact,
            options.model,
            options.against,
            decodes,
            prefills,
            options.repeats,
            options.alone,
            options.steps,
            status.update,
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
        table.add_row(f"{row.workload} {row.batch} x {row.length}", row.engine, *figures_of)
    console.print(table)
    loads, first = _starts(figures["load_seconds"]), _starts(figures["first_token_seconds"])
    console.print(f"engines loaded in: {loads}; first token after: {first}")
    if options.json:
        print(json.dumps({**figures, "rows": [asdict(row) for row in figures["rows"]]}))
    return INTERRUPTED if figures["interrupted"] else 0


def _starts(seconds: dict[str, list[float]]) -> str:
    """`compiled 20.9 s, 20.8 s; vllm 47.0 s, 46.1 s`."""
    return "; ".join(f"{name} {', '.join(f'{start:.1f} s' for start in starts)}" for name, starts in seconds.items())


if __name__ == "__main__":
    sys.exit(main())
