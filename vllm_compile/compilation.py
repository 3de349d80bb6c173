"""What a compile is asked for, and what it answers.  Imports neither TVM nor torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cache import Cache, key_of
from .file_digests import FileDigests
from .model_files import find_files
from .relax_passes.record import PassRecord
from .targets import Target
from .toolchain import compile_toolchain

KIND = "artifacts"


@dataclass(frozen=True)
class CompileOptions:
    """How to compile.

    Attributes:
        dtype: bfloat16 or float32; None keeps the model's own.
        strict: a pass that matches nothing is an error instead of a warning.
        dummy_weights: seed of random weights to use instead of a checkpoint's, or None.
        dump: directory for the module after each pass, as TVMScript, or None.
        pack: `lossless` packs weights to 12 bits where a kernel reads them so; `none` leaves them as they are.
        db: URL of a tuning database to take configurations of kernels from, or None.
        buckets: bucket file for a target whose graphs are static, or None: each batch has a graph of its own shape.
        weightless: leave the weights out; such an artifact is served with vLLM's `--load-format dummy` alone.
    """

    dtype: str | None = None
    strict: bool = False
    dummy_weights: int | None = None
    dump: Path | None = None
    pack: str = "lossless"
    weightless: bool = False
    db: str | None = None
    buckets: Path | None = None

    @property
    def seed(self) -> int | None:
        """Of dummy weights, or None where a checkpoint is read: not without weights, when nothing of it is."""
        return 0 if self.weightless and self.dummy_weights is None else self.dummy_weights


@dataclass(frozen=True)
class CompileResult:
    """What was made, and how.

    Attributes:
        artifact: its directory.
        passes: each pass and its number of matches.
        kernels: op, family, symbol and shapes of each kernel, and its median time in microseconds
            where verification called it.
        seconds: duration of each stage; kernels are built while weights are written, and count what they took longer.
        verdict: outcome of the quick verification: {"outcome": pass | fail | not-run, ...}.
        warnings: what the user should look at.
        built: kernels that were compiled; the others came from the cache.
        unchanged: the artifact was there already, made from the same, and nothing was done.
    """

    artifact: Path
    passes: list[PassRecord]
    kernels: list[dict[str, Any]]
    seconds: dict[str, float]
    verdict: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    built: int = 0
    unchanged: bool = False


def remember(cache: Cache, request: str, made: str) -> None:
    """Keep which artifact (its manifest's digest) the request with this key makes."""
    cache.put(KIND, request, "an artifact: its manifest's digest", made.encode())


def recall(cache: Cache, request: str) -> str | None:
    """The manifest's digest of the artifact that the request with this key makes, if it is known."""
    made = cache.get(KIND, request)
    return None if made is None else made.decode()


def request_key(model: Path, target: Target, options: CompileOptions, digests: FileDigests) -> str:
    """SHA-256 of all that an artifact is made from but tuning database and buckets: equal requests, equal artifacts.

    Raises:
        OSError, ModelError: a file of the model cannot be read.
        TargetError: a compiler that the target needs is missing.
    """
    files = find_files(model)
    choices = {name: value for name, value in asdict(options).items() if name not in ("dump", "db", "buckets")}
    facts = {
        "files": {name: digests.sha256(files.directory / name) for name in files.all(options.seed is None)},
        "options": choices,
        "toolchain": compile_toolchain(target),
    }
    return key_of(facts)
