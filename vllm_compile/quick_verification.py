"""The quick form of `verify`, in a process of its own: a kernel that crashes must not take the compiler along.

Hugging Face's half needs no kernel, so the process starts while kernels are still being compiled: it imports, runs the
references, and waits to be told that the artifact is whole.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import TargetError
from .runtime.manifest import check_target

if TYPE_CHECKING:
    from .compilation import CompileOptions
    from .model_files import ModelFiles
    from .targets import Target

Verdict = dict[str, Any]
REFERENCES = "the references have run"  # printed before any kernel runs


@contextmanager
def quick_verification(
    artifact: Path, model: Path, target: str, dummy_seed: int | None
) -> Iterator[Callable[[], Verdict]]:
    """Starts to verify; leaving the block ends the process.

    Args:
        artifact: directory with plan.json; kernels and weights are looked for when the verdict is asked for.

    Yields:
        What waits for the verdict, to be called once: {"outcome": "pass" | "fail", ...the report} or
        {"outcome": "not-run", "reason": ...}.
    """
    command = [sys.executable, "-m", "vllm_compile.quick_verification", str(artifact), str(model), target]
    if dummy_seed is not None:
        command.append(str(dummy_seed))
    with tempfile.TemporaryFile("w+") as messages:  # a pipe that nobody reads yet could fill up
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=messages, text=True)

        def verdict() -> Verdict:
            printed, _ = process.communicate("the artifact is whole\n")
            messages.seek(0)
            return _verdict(process.returncode, printed, messages.read())

        try:
            yield verdict
        finally:
            process.kill()
            process.communicate()


def not_run(reason: str) -> AbstractContextManager[Callable[[], Verdict]]:
    """In the place of `quick_verification` where nothing can be verified."""
    return nullcontext(lambda: {"outcome": "not-run", "reason": reason})


def verification_of(
    directory: Path, source: ModelFiles, machine: Target, options: CompileOptions
) -> AbstractContextManager[Callable[[], Verdict]]:
    """The quick verification of a compile, or why it is not run; see `quick_verification`."""
    if options.weightless:
        return not_run("compiled without weights")
    if source.graph is not None:
        verifier = "`vllm-compile verify` takes the model that the graph was built from"
        return not_run(f"made from the ONNX graph {source.graph}; {verifier}")
    try:
        check_target(machine.name, machine.features, directory)
    except TargetError as error:
        return not_run(str(error))
    return quick_verification(directory, source.directory, machine.name, options.dummy_weights)


def _verdict(code: int, printed: str, messages: str) -> Verdict:
    if code < 0 and REFERENCES not in printed.splitlines():
        return {"outcome": "not-run", "reason": f"Hugging Face's references were ended by signal {-code}"}
    if code == -signal.SIGKILL:
        return {"outcome": "not-run", "reason": "the process was killed: is there memory for it?"}
    if code < 0:
        return {"outcome": "fail", "reason": f"a kernel crashed (signal {-code})"}
    if code != 0:
        lines = messages.strip().splitlines()
        return {"outcome": "not-run", "reason": lines[-1] if lines else f"exit code {code}"}
    report = json.loads(printed.splitlines()[-1])
    return {"outcome": "pass" if report.pop("passed") else "fail", **report}


def main(arguments: list[str]) -> int:
    """`python -m vllm_compile.quick_verification ARTIFACT MODEL TARGET [DUMMY_SEED]`.

    Compares once a line has come on stdin; prints `REFERENCES` before, and the report as JSON.
    """
    from .verify import compare, run_references

    artifact, model, target, *seed = arguments
    references = run_references(Path(artifact), Path(model), target, int(seed[0]) if seed else None, quick=True)
    if not sys.stdin.readline():
        return 1  # whoever compiled is gone
    print("\n" + REFERENCES, flush=True)  # in a line of its own, whatever the references have printed
    print(json.dumps(asdict(compare(Path(artifact), references))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
