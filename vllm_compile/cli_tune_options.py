"""The options of `vllm-compile tune`, and which of them contradict each other."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cli_values import positive
from .errors import VllmCompileError

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
DEFAULTS: Mapping[str, Any] = {
    "target": "cpu",
    "trials": 64,
    "traces": 0,
    "budget": float("inf"),
    "pack": "lossless",
    "board": "",
}

# Of an option, or of a target's name: options that would have no effect beside it, or the opposite one, and why.
HERE_ALONE = "MetaSchedule searches where tune runs; others take listed configurations alone"
NO_GPU_TRACES = "MetaSchedule searches the schedules of a CPU's kernels"
REFUSED: Mapping[str, Sequence[tuple[tuple[str, ...], str]]] = {
    "measure": [
        (("model", "target", "trials", "pack", "dtype"), "what is measured was decided by `tune --build`"),
        (("build",), "one machine builds, another measures; `tune --target cuda --db URL` does both"),
        (("traces",), HERE_ALONE),
        (("submit", "board"), "workers build for themselves"),
    ],
    "build": [
        (("db", "budget"), "candidates are only built, for `tune --measure DIR --db URL`"),
        (("traces",), HERE_ALONE),
        (("submit", "board"), "workers build for themselves"),
    ],
    "submit": [
        (("traces",), HERE_ALONE),
        (("budget",), "workers go on until the queue is empty"),
    ],
    "cpu": [(("build",), "a CPU is measured where its kernels are built")],
    "cuda": [(("traces",), NO_GPU_TRACES), (("board",), "boards are CPUs")],
    "rocm": [
        (("submit", "build", "board"), "a model of the chip estimates, which needs no other machine"),
        (("traces",), NO_GPU_TRACES),
    ],
}
NEEDED = {"board": ("submit", "boards take tasks from the queue, by `vllm-compile worker --executor tvm-rpc`")}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add them; what is not given is None until `set_defaults`."""
    add = parser.add_argument
    add("--model", type=Path, metavar="DIR", help="Hugging Face directory, or artifact")
    add("--target", help="cpu (default), cuda, h100, h200: measured; rocm, gfx90a, gfx950: estimated, by a model")
    add("--build", type=Path, metavar="DIR", help="only build the candidates, to be measured elsewhere")
    add("--measure", type=Path, metavar="DIR", help="measure what --build made; no --model, no TVM, no compiler needed")
    add("--db", metavar="URL", help="the tuning database, where records go")
    add("--trials", type=positive, metavar="N", help="configurations of a range of tokens at most (default: 64)")
    traces = "schedules of TIR that MetaSchedule may try, too, for each number of tokens (cpu, --pack none)"
    add("--traces", type=positive, metavar="N", help=traces)
    add("--budget", type=seconds_of, metavar="10m", help="time to spend")
    add("--only", type=lambda text: text.split(","), default=[], metavar="NAMES", help="weights' names")
    add("--pack", choices=("lossless", "none"), help="weights, as for compile (default: lossless)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: the model's own")
    add("--dry-run", action="store_true", help="say what there is to tune, and how long it will take")
    add("--submit", action="store_true", help="leave the tasks to workers (vllm-compile worker)")
    add("--board", metavar="KEY", help="with --submit: to workers that have boards of this key")
    add("--json", action="store_true", help="a summary as the last line of stdout")


def seconds_of(text: str) -> float:
    """`90`, `90s`, `10m` or `2h` in seconds; ArgumentTypeError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 10m or 2h")
    return float(found[1]) * UNITS[found[2]]


def check(options: argparse.Namespace, kind: str = "") -> None:
    """Raise VllmCompileError if some of the options contradict each other, or a target of this kind."""
    given = {name for name, value in vars(options).items() if not (value is None or value is False or value == [])}
    for name in (name for name in REFUSED if name in given or name == kind):
        what = f"--target {options.target or DEFAULTS['target']}" if name == kind else _option(name)
        for others, reason in REFUSED[name]:
            for other in (other for other in others if other in given):
                raise VllmCompileError(f"{what} and {_option(other)} contradict each other: {reason}")
    for name, (needed, reason) in NEEDED.items():
        if name in given and needed not in given:
            raise VllmCompileError(f"{_option(name)} needs {_option(needed)}: {reason}")


def set_defaults(options: argparse.Namespace) -> None:
    """Give what was not given its default."""
    for name, value in DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
