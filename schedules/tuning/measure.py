"""Checks and times the candidates of a task; what a worker runs in a process of its own.

Candidates are built by another process (prepare.py): TVM's thread pool must not take the place of OpenMP's here.
Each is first compared with the operator's reference on a poisoned output.  Those that are right take turns, over
copies of the weights that exceed the caches together; the fastest take more turns beside the default.
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
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import tvm_ffi
from safetensors.torch import load_file

from vllm_compile.bandwidth import read_bandwidth
from vllm_compile.runtime.executor import load_kernels
from vllm_compile.runtime.manifest import LIBRARY
from vllm_compile.runtime.memory import allocate

from ..database.executors import Outcome
from ..database.fingerprint import Fingerprint
from ..database.record import How, Provenance, Record, Schedule, Times, Verdict
from ..database.workload import Workload

TRIAL = "trial"  # kind of task
TENSORS, CASE = "tensors.safetensors", "case.json"  # written by prepare.py beside the library
COLD_BYTES, MOST_COPIES = 256 << 20, 64  # several times the caches; weights of a few KB are warm in a model too
TURNS, FINALISTS, FINAL_TURNS = 3, 5, 15
NO_WORSE = 0.98  # what is not faster than the default by more than noise is not preferred to it


def measure(payload: dict[str, Any]) -> Outcome:
    """For each range of a task (task.py) a record of the fastest configuration, the default's if none is faster.

    `result` has, for each range: `tokens`, `tried`, `wrong` (configurations whose result was not the reference's),
    `default_us` and `best_us`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command = [sys.executable, "-m", "vllm_compile.schedules.tuning.prepare", scratch]
        built = subprocess.run(command, input=json.dumps(payload), text=True, capture_output=True)
        if built.returncode != 0:
            lines = built.stderr.strip().splitlines()
            raise RuntimeError(f"candidates cannot be built: {lines[-1] if lines else built.returncode}")
        case = _Case(folder)  # mapped: it needs no directory from here on, and a crash leaves none behind
    found = [case.fastest(entry) for entry in case.description["ranges"]]
    return Outcome([summary for summary, _ in found], [record for _, record in found])


def trial(payload: dict[str, Any]) -> Outcome:
    """Of each kernel of the one range that prepare.py wrote into `folder`, in order, as the result: `error` in units of
    what is allowed, `us` of a few calls (none of a wrong one), `moved_bytes`, `bandwidth` (bytes a second) and
    `executed_on`."""
    case = _Case(Path(payload["folder"]))
    (entry,) = case.description["ranges"]
    return Outcome(case.tried(entry))


class _Case:
    """What prepare.py wrote, loaded."""

    def __init__(self, folder: Path) -> None:
        self.description = json.loads((folder / CASE).read_text())
        self._kernel = load_kernels(folder / LIBRARY)
        tensors = load_file(folder / TENSORS)
        self._expected = tensors.pop("expected")
        self._inputs = [tensors[str(i)] for i in range(len(tensors))]
        packed = [t for t, is_packed in zip(self._inputs, self.description["packed"], strict=True) if is_packed]
        self._weight_bytes = sum(tensor.nbytes for tensor in packed)
        copies = min(-(-COLD_BYTES // max(self._weight_bytes, 1)), MOST_COPIES)
        self._copies = [self._copy() for _ in range(copies)]
        self._bandwidth = read_bandwidth(torch.device("cpu")) * 1e9

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
        about = {"moved_bytes": self._moved(entry), "bandwidth": self._bandwidth, "executed_on": _processor()}
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
            Fingerprint.from_text(self.description["machine"]),
            Schedule.of_family(self.description["family"], config),
            How.MEASURED,
            times,
            rate / 1e9,
            rate / self._bandwidth,
            Verdict(error, 1.0, _processor()),
            Provenance(author(), int(time.time()), platform.node(), version("vllm-compile")),
        )

    def _copy(self) -> list[torch.Tensor]:
        """The inputs, packed weights in memory of their own: in huge pages, as the runtime maps them."""
        return [
            _huge(tensor) if packed else tensor
            for tensor, packed in zip(self._inputs, self.description["packed"], strict=True)
        ]

    def _call(self, symbol: str, tokens: int) -> Callable[[int], torch.Tensor]:
        """The kernel as a function of which copy to use; it gives the output, which is the same every time."""
        kernel, by_tokens = self._kernel(symbol), self.description["by_tokens"]
        out = torch.full((tokens, *self._expected.shape[1:]), float("nan"), dtype=self._expected.dtype)
        bound = [
            [tvm_ffi.from_dlpack(t[:tokens] if rows else t) for t, rows in zip(copy, by_tokens, strict=True)]
            for copy in self._copies
        ]
        result = tvm_ffi.from_dlpack(out)

        def call(turn: int) -> torch.Tensor:
            kernel(*bound[turn % len(bound)], result)
            return out

        return call

    def _error(self, symbol: str, tokens: int) -> float:
        """The largest error, in units of what is allowed; infinite where the result is not a number."""
        ours, wanted = self._call(symbol, tokens)(0).double(), self._expected[:tokens].double()
        rtol, atol = self.description["tolerance"]
        error = ((ours - wanted).abs() / (atol + rtol * wanted.abs())).max().item()
        return error if error == error else float("inf")

    def _times(self, symbols: Sequence[str], tokens: int, turns: int) -> dict[str, list[float]]:
        """Microseconds of each kernel's calls, taking turns; the first turn is not counted."""
        calls = {symbol: self._call(symbol, tokens) for symbol in symbols}
        times: dict[str, list[float]] = {symbol: [] for symbol in symbols}
        number = 0
        for turn in range(turns + 1):
            for symbol, call in calls.items():
                began = time.perf_counter()
                call(number)
                taken = (time.perf_counter() - began) * 1e6
                number += 1
                if turn:
                    times[symbol].append(taken)
        return times


def _processor() -> str:
    return platform.processor() or platform.machine()


def author() -> str:
    """Who measures: the user's name, or number where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _percentiles(times: Sequence[float]) -> Times:
    p10, *_, p90 = quantiles(times, n=10, method="inclusive")
    return Times(quantiles(times, n=2, method="inclusive")[0], p10, p90)


def _huge(tensor: torch.Tensor) -> torch.Tensor:
    memory = allocate(tensor.nbytes, torch.device("cpu"))
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
