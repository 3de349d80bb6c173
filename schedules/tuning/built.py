"""Tasks built on one machine, to be measured on another that needs neither TVM nor a compiler: a folder for each.

Each has its kernels, inputs, and results to compare with (prepare.py), and `task.json`, written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vllm_compile.errors import VllmCompileError

from ..database.fingerprint import Fingerprint
from .device import DEVICES
from .measure import CASE
from .task import MEASURE_BUILT, Task

TASK = "task.json"


def build(tasks: Sequence[Task], folder: Path) -> Iterator[Task]:
    """Build tasks that are not there yet; gives each as it is done.

    Raises:
        TargetError: a compiler that the target needs is missing or fails.
    """
    from .prepare import prepare  # needs TVM; the rest of this file is read where there is none

    known = [task for task, _ in _read(folder)]
    for task in tasks:
        if task not in known:
            place = folder / f"task{len(known):04}"
            place.mkdir(parents=True, exist_ok=True)
            prepare(task.payload(), place)
            (place / TASK).write_text(json.dumps(task.to_json()))
            known.append(task)
        yield task


def built(folder: Path) -> tuple[list[Task], Fingerprint]:
    """The tasks in a folder, and this machine.

    Raises:
        VllmCompileError: there are none, or for several machines.
    """
    tasks = [replace(task, method=MEASURE_BUILT, built=str(place)) for task, place in _read(folder)]
    cases = [json.loads((Path(task.built) / CASE).read_text()) for task in tasks]
    machines = {(case["device"], case["machine"]) for case in cases}
    if len(machines) != 1:
        raise VllmCompileError(f"{folder} has tasks for {len(machines)} machines; `tune --build {folder}` writes some")
    ((device, machine),) = machines
    return tasks, DEVICES[device]().machine(Fingerprint.from_text(machine))


def _read(folder: Path) -> list[tuple[Task, Path]]:
    """Those that are whole."""
    found = sorted(folder.glob(f"task*/{TASK}"))
    return [(Task.from_json(json.loads(path.read_text())), path.parent) for path in found]
