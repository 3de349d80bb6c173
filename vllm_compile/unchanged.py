"""A compile that has nothing to do is found out before TVM and torch are imported."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from .cache import Cache
from .compilation import CompileOptions, CompileResult, recall, request_key
from .errors import ArtifactError, ModelError, TargetError
from .file_digests import FileDigests
from .model_files import find_files
from .relax_passes.record import PassRecord
from .runtime.manifest import check_files, check_target, read_manifest
from .targets import Target, resolve


def compile_if_changed(
    model: str | Path,
    target: str,
    out: str | Path,
    options: CompileOptions,
    progress: Callable[[str], None] = lambda stage: None,
    cache: Cache | None = None,
) -> CompileResult:
    """What `driver.compile_model` does, unless `cache` shows that the artifact in `out` is what that would make."""
    if cache is not None:
        progress("looking for changes")
        found = find_unchanged(Path(model), resolve(target), Path(out), options, cache)
        if found is not None:
            return found
    from .driver import compile_model

    return compile_model(model, target, out, options, progress, cache)


def find_unchanged(
    model: Path, target: Target, out: Path, options: CompileOptions, cache: Cache
) -> CompileResult | None:
    """The artifact in `out`, if it is whole and was made from this model, with these options, by this toolchain.

    None where it is not, where a dump is asked for, where a tuning database or buckets may have changed, and where the
    artifact was not verified and could be here.
    """
    start, digests = time.perf_counter(), FileDigests(cache)
    if options.dump is not None or options.db is not None or options.buckets is not None:
        return None
    try:
        manifest = read_manifest(out)
        if manifest["digest"] != recall(cache, request_key(model, target, options, digests)):
            return None
    except (ArtifactError, ModelError, OSError):  # nothing here, or nothing to compile: the compiler says what is wrong
        return None
    try:
        check_files(out, manifest, digest=digests.sha256)
    except ArtifactError as error:
        cache.problems.append(str(error))
        return None
    could_be = not options.weightless and find_files(model).graph is None
    if manifest["verdict"]["outcome"] == "not-run" and could_be and _runs_here(target, out):
        return None
    passes = [PassRecord(**record) for record in manifest["passes"]]
    kernels = [{**kernel, "microseconds": None} for kernel in manifest["kernels"]]
    seconds = {"unchanged": round(time.perf_counter() - start, 3)}
    return CompileResult(out, passes, kernels, seconds, manifest["verdict"], list(cache.problems), unchanged=True)


def _runs_here(target: Target, out: Path) -> bool:
    try:
        check_target(target.name, target.features, out)
    except (ArtifactError, TargetError):
        return False
    return True
