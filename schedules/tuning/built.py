"""Tasks built on one machine, to be measured on another that needs neither TVM nor a compiler: a folder for each.

Each has its kernels, what inputs and results to compare with are made of (prepare.py), and `task.json`, written last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from vllm_compile.canonical import canonical
from vllm_compile.errors import VllmCompileError
from vllm_compile.targets import resolve
from vllm_compile.toolchain import kernel_toolchain
from vllm_compile.whole_file import write_whole

from ..database.fingerprint import Fingerprint
from .device import DEVICES
from .measure import CASE
from .task import MEASURE_BUILT, Task

TASK = "task.json"


def build(tasks: Sequence[Task], folder: Path) -> Iterator[Task]:
    """Build tasks that are not there yet, or were built by other sources or compilers; gives each as it is done.

    Raises:
        TargetError: a compiler that the target needs is missing or fails.
    """
    from .prepare import prepare  # needs TVM; the rest of this file is read where there is none

    builders = {name: canonical(kernel_toolchain(resolve(name))) for name in {task.target for task in tasks}}
    for task, builder, place in _read(folder):
        if builder != builders.get(task.target, builder):
            shutil.rmtree(place)
    known = [task for task, *_ in _read(folder)]
    for task in tasks:
        if task not in known:
            place = next(place for i in count() if not (place := folder / f"task{i:04}" / TASK).exists()).parent
            place.mkdir(parents=True, exist_ok=True)
            prepare(task.payload(), place)
            write_whole(place / TASK, json.dumps({"task": task.to_json(), "built_by": builders[task.target]}))
            known.append(task)
        yield task


def built(folder: Path) -> tuple[list[Task], Fingerprint]:
    """The tasks in a folder, and this machine.

    Raises:
        VllmCompileError: there are none, or for several machines, or of another version's form.
    """
    tasks = [replace(task, method=MEASURE_BUILT, built=str(place)) for task, _, place in _read(folder)]
    cases = [json.loads((Path(task.built) / CASE).read_text()) for task in tasks]
    if not all("seed" in case for case in cases):
        raise VllmCompileError(f"{folder} was made by an older vllm-compile: `tune --build` it again")
    machines = {(case["device"], case["machine"]) for case in cases}
    if len(machines) != 1:
        raise VllmCompileError(
            f"{folder} has tasks for {len(machines)} targets, one is wanted: `tune --build` with a folder for each"
        )
    ((device, machine),) = machines
    return tasks, DEVICES[device]().machine(Fingerprint.from_text(machine))


def _read(folder: Path) -> list[tuple[Task, str, Path]]:
    """Those that are whole: the task, what built it, where."""
    found = []
    for path in sorted(folder.glob(f"task*/{TASK}")):
        content = json.loads(path.read_text())
        found.append((Task.from_json(content["task"]), content["built_by"], path.parent))
    return found
