"""Checks and times the candidates of a task; what a worker runs in a process of its own.

Candidates are built by another process (prepare.py), of a GPU maybe on another machine: TVM's thread pool must not take
the place of OpenMP's here.
Each is first compared with the operator's reference, on inputs that are made here (inputs.py) and a poisoned output.
Those that are right take turns, over copies of the weights that exceed the caches together; the fastest take more turns
beside the default.
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from vllm_compile.canonical import canonical
from vllm_compile.runtime.manifest import LIBRARY

from ..database.executors import Outcome
from ..database.fingerprint import Fingerprint
from ..database.record import How, Provenance, Record, Schedule, Times, Verdict
from ..database.workload import Workload
from .device import DEVICES, Call, Device
from .inputs import layouts_of, make, spec_of

TRIAL = "trial"  # kind of task
CASE = "case.json"  # written by prepare.py beside the library
COLD_BYTES, MOST_COPIES = 256 << 20, 64  # several times the caches; weights of a few KB are warm in a model too
TURNS, FINALISTS, FINAL_TURNS = 3, 5, 15
NO_WORSE = 0.98  # what is not faster than the default by more than noise is not preferred to it


def measure(payload: dict[str, Any]) -> Outcome:
    """For each range of a task (task.py) a record of the fastest configuration, the default's if none is faster.

    `result` has, for each range: `tokens`, `tried`, `wrong` (configurations whose result was not the reference's),
    `default_us` and `best_us`.
    """
    return _outcome(_built_here(payload), payload)


def measure_noting(payload: dict[str, Any]) -> Outcome:
    """As `measure`; leaves which configuration it is about to call for the first time in the file `note` (canonical
    JSON), see search.py; no task of a queue, which might name any file."""
    case = _built_here(payload)
    case.note = Path(payload["note"])
    return _outcome(case, payload)


def measure_built(payload: dict[str, Any]) -> Outcome:
    """As `measure_noting`, of what lies in the folder `built` (built.py); no task of a queue either: any library."""
    case = _Case(Path(payload["built"]))
    case.note = Path(payload["note"]) if "note" in payload else None
    return _outcome(case, payload)


def _built_here(payload: dict[str, Any]) -> _Case:
    with tempfile.TemporaryDirectory() as scratch:
        build(payload, Path(scratch))
        return _Case(Path(scratch))  # mapped: it needs no directory from here on, and a crash leaves none behind


def measure_on(device: Device, payload: dict[str, Any], folder: Path) -> Outcome:
    """As `measure`, on a device that is not this machine's, of what prepare.py wrote into `folder`."""
    return _outcome(_Case(folder, device), payload)


def build(payload: dict[str, Any], folder: Path) -> None:
    """Have prepare.py write a case, in a process with TVM; RuntimeError if it cannot."""
    command = [sys.executable, "-m", "vllm_compile.schedules.tuning.prepare", str(folder)]
    built = subprocess.run(command, input=json.dumps(payload), text=True, capture_output=True)
    if built.returncode != 0:
        lines = built.stderr.strip().splitlines()
        raise RuntimeError(f"candidates cannot be built: {lines[-1] if lines else built.returncode}")


def _outcome(case: _Case, payload: dict[str, Any]) -> Outcome:
    """Of the payload's ranges and configurations, all of which the case has."""
    symbols = {canonical(config): symbol for symbol, config in case.description["configs"].items()}
    found = []
    for workload, tokens, configs in payload["ranges"]:
        entry = {"workload": workload, "tokens": tokens, "symbols": [symbols[canonical(c)] for c in configs]}
        try:
            found.append(case.fastest(entry))
        except RuntimeError:
            case.device.check()
            raise
    return Outcome([summary for summary, _ in found], [record for _, record in found])


def trial(payload: dict[str, Any]) -> Outcome:
    """Of each kernel of the one range that prepare.py wrote into `folder`, in order, as the result: `error` in units of
    what is allowed, `us` of a few calls (none of a wrong one), `moved_bytes`, `bandwidth` (bytes a second) and
    `executed_on`."""
    case = _Case(Path(payload["folder"]))
    (entry,) = case.description["ranges"]
    return Outcome(case.tried(entry))


class _Case:
    """What prepare.py wrote, loaded.

    Attributes:
        note: where it leaves which configuration it is about to call for the first time, if anywhere.
    """

    note: Path | None = None

    def __init__(self, folder: Path, device: Device | None = None) -> None:
        self.description = json.loads((folder / CASE).read_text())
        self.device = device or DEVICES[self.description["device"]]()
        self._kernel = self.device.load(folder / LIBRARY)
        self._inputs, self._expected = make(
            spec_of(json.loads(self.description["ranges"][0]["workload"])),
            layouts_of(self.description["layouts"]),
            self.description["tokens"],
            self.description["seed"],
            self.device.where,
        )
        weights = [t for t, is_weight in zip(self._inputs, self.description["weights"], strict=True) if is_weight]
        self._weight_bytes = sum(tensor.nbytes for tensor in weights)
        copies = min(-(-COLD_BYTES // max(self._weight_bytes, 1)), MOST_COPIES)
        self._copies = [self._copy() for _ in range(copies)]
        self._bandwidth = self.device.bandwidth()

    @cached_property
    def _machine(self) -> Fingerprint:
        return self.device.machine(Fingerprint.from_text(self.description["machine"]))

    def fastest(self, entry: dict[str, Any]) -> tuple[dict[str, Any], Record]:
        """Of one range: a summary, and the record of the best."""
        symbols, tokens = entry["symbols"], entry["tokens"]
        errors = self._errors(entry)
        right = [symbol for symbol in symbols if errors[symbol] <= 1]
        default = symbols[0]
        if default not in right:
            raise RuntimeError(f"the default {self.description['configs'][default]} is wrong: {errors[default]} times")
        times = self._times(right, tokens, TURNS)
        ranking = sorted(right, key=lambda symbol: min(times[symbol]))
        final = self._times([default, *(s for s in ranking[:FINALISTS] if s != default)], tokens, FINAL_TURNS)
        medians = {symbol: _percentiles(taken).median for symbol, taken in final.items()}
        best = min(medians, key=medians.__getitem__)
        if medians[best] > NO_WORSE * medians[default]:
            best = default
        configs = self.description["configs"]
        summary = {
            "tokens": tokens,
            "tried": len(symbols),
            "wrong": [configs[symbol] for symbol in symbols if symbol not in right],
            "default_us": medians[default],
            "best_us": medians[best],
        }
        return summary, self._record(entry, configs[best], _percentiles(final[best]), errors[best])

    def tried(self, entry: dict[str, Any]) -> list[dict[str, Any]]:
        """See `trial`."""
        errors = self._errors(entry)
        times = self._times([s for s, error in errors.items() if error <= 1], entry["tokens"], TURNS)
        about = {"moved_bytes": self._moved(entry), "bandwidth": self._bandwidth, "executed_on": self.device.name}
        return [{"error": errors[s], "us": times.get(s, []), **about} for s in entry["symbols"]]

    def _errors(self, entry: dict[str, Any]) -> dict[str, float]:
        """Of each kernel, for the least tokens of the range too, which leave tiles ragged."""
        counts = {json.loads(entry["workload"])["tokens"][0], entry["tokens"]}
        return {symbol: max(self._error(symbol, tokens) for tokens in counts) for symbol in entry["symbols"]}

    def _moved(self, entry: dict[str, Any]) -> int:
        """Bytes that a call has to move."""
        return self._weight_bytes + entry["tokens"] * self.description["row_bytes"]

    def _record(self, entry: dict[str, Any], config: Any, times: Times, error: float) -> Record:
        rate = self._moved(entry) / times.median * 1e6
        return Record(
            Workload.from_text(entry["workload"]),
            self._machine,
            Schedule.of_family(self.description["family"], config),
            How.MEASURED,
            times,
            rate / 1e9,
            rate / self._bandwidth,
            Verdict(error, 1.0, self.device.name),
            Provenance(author(), int(time.time()), platform.node(), version("vllm-compile")),
        )

    def _copy(self) -> list[torch.Tensor]:
        """The inputs, weights in memory of their own."""
        return [
            self.device.copy(tensor) if is_weight else tensor
            for tensor, is_weight in zip(self._inputs, self.description["weights"], strict=True)
        ]

    def _calls(
        self, symbol: str, tokens: int, copies: Sequence[Sequence[torch.Tensor]]
    ) -> tuple[list[Call], Any, torch.Tensor]:
        """The kernel bound to each of these copies; the output, which is the same for all, and where it is read."""
        kernel, by_tokens = self._kernel(symbol), self.description["by_tokens"]
        out = self._expected.new_full((tokens, *self._expected.shape[1:]), float("nan"))
        bound = [
            [self.device.argument(t[:tokens] if rows else t) for t, rows in zip(copy, by_tokens, strict=True)]
            for copy in copies
        ]
        result = self.device.output(out)
        return [partial(kernel, *arguments, result) for arguments in bound], result, out

    def _error(self, symbol: str, tokens: int) -> float:
        """The largest error, in units of what is allowed; infinite where the result is not a number."""
        (call,), result, out = self._calls(symbol, tokens, self._copies[:1])
        self._note(symbol)
        self.device.run(call)
        self.device.read(result, out)
        ours, wanted = out.double(), self._expected[:tokens].double()
        rtol, atol = self.description["tolerance"]
        error = ((ours - wanted).abs() / (atol + rtol * wanted.abs())).max().item()
        return error if error == error else float("inf")

    def _note(self, symbol: str) -> None:
        if self.note is not None:
            self.note.write_text(canonical(self.description["configs"][symbol]))

    def _times(self, symbols: Sequence[str], tokens: int, turns: int) -> dict[str, list[float]]:
        """Microseconds of each kernel's calls, taking turns; the first turn is not counted."""
        timers = {symbol: self.device.timer(self._calls(symbol, tokens, self._copies)[0]) for symbol in symbols}
        times: dict[str, list[float]] = {symbol: [] for symbol in symbols}
        number = 0
        for turn in range(turns + 1):
            for symbol, timer in timers.items():
                if turn == 0:
                    self._note(symbol)
                taken = timer(number)
                number += 1
                if turn:
                    times[symbol].append(taken)
        return times


def author() -> str:
    """Who measures: the user's name, or number where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _percentiles(times: Sequence[float]) -> Times:
    p10, *_, p90 = quantiles(times, n=10, method="inclusive")
    return Times(quantiles(times, n=2, method="inclusive")[0], p10, p90)
