"""From a model directory to an artifact: the stages in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tvm
from tvm import tirx

from .artifact import source_digest, write_config, write_manifest
from .cache import Cache
from .compilation import CompileOptions, CompileResult, remember, request_key
from .errors import ArtifactError, DatabaseError, ModelError, TargetError, UnsupportedError
from .file_digests import FileDigests, status_of
from .frontend.families import max_positions
from .frontend.hf import trace
from .frontend.importer import import_model
from .frontend.model import DTYPES
from .frontend.read_model import read_model
from .kernel_cache import KernelCache
from .lowering import Lowered, lower
from .model_files import ModelFiles, find_files
from .model_shape import model_shape
from .quick_verification import verification_of
from .relax_passes.pipeline import OPTIONAL, run_passes
from .relax_passes.record import PassRecord
from .runtime import manifest as files
from .runtime.buckets import BucketPlan, read_buckets
from .runtime.plan import Plan
from .schedules.build import build_library
from .schedules.family import Tuned
from .schedules.select import choose, operators
from .spec import OpSpec
from .staging import staged
from .targets import Target, gaudi, resolve
from .weights import UnfitWeightError, WeightProgram, write_shards


def compile_model(
    model: str | Path,
    target: str = "cpu",
    out: str | Path = "artifact",
    options: CompileOptions | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    cache: Cache | None = None,
) -> CompileResult:
    """Compile a model into an artifact that vLLM serves.

    Args:
        model: Hugging Face directory with config.json, safetensors and tokenizer; or an ONNX file (or the directory
            of one) with genai_config.json or config.json, and tokenizer, beside it.
        target: what to compile for; `cpu` is the machine this runs on.
        out: the artifact's directory; an older artifact there is replaced when the new one is whole.
        options: see `CompileOptions`.
        progress: called with the name of each stage as it starts.
        cache: where kernels and digests of files are looked up and kept, or None.

    Raises:
        ModelError: the model is missing, incomplete or damaged.
        UnsupportedError: an architecture, operator, dtype or shape is not supported; it is named.
        TargetError: the target is unknown, this machine is none, or a compiler is missing.
        ArtifactError: `out` cannot be written.
        DatabaseError: the tuning database cannot be read.
        BucketError: the bucket file is damaged.
    """
    options = options or CompileOptions()
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        progress(name)
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 3)

    source, final = Path(model), Path(out)
    machine = resolve(target)
    buckets = _buckets(options.buckets, machine)
    found = find_files(source)
    digests = FileDigests(cache)
    before = _statuses(found, options)
    with stage("import"):
        imported = read_model(found, options.dtype, options.seed)
    with stage("passes"):
        module, passes = run_passes(
            imported.module, _dumper(Path(options.dump) if options.dump else None), operators(machine)
        )
        warnings = _check_matches(passes, options.strict)
    weights = WeightProgram(module, imported.read)
    unpacked: set[OpSpec] = set()  # calls one of whose weights does not fit the lossless format

    tuned = _tuned(options.db, machine)

    def attempt() -> CompileResult:
        lossless = options.pack == "lossless"
        with stage("lowering"):
            lowered = lower(module, lambda spec: choose(spec, machine, lossless and spec not in unpacked, tuned))
        with staged(final) as directory:
            plan = Plan(model_shape(imported, module), lowered.functions, lowered.restored)
            (directory / files.PLAN).write_text(plan.to_json())
            write_config(imported.fields, found, imported.dtype, directory)
            if buckets is not None:
                buckets.write(directory / files.BUCKETS)
            library = directory / files.library_of(machine.name)
            known = KernelCache(cache, lowered, machine) if cache is not None else None
            # Kernels are compiled by one thread, which weights leave free while they are read and written.
            with ThreadPoolExecutor(1) as pool:
                if restored := known is not None and known.restore(library):
                    built = pool.submit(lambda: None)
                else:
                    built = pool.submit(build_library, _prim_funcs(lowered, machine), machine, library)
                if not options.weightless:
                    with stage("weights"):
                        write_shards(
                            lowered.weights.values(), partial(_unless_failed, built, weights.evaluate), directory
                        )
                with verification_of(directory, found, machine, options) as verify:
                    with stage("kernels"):
                        built.result()
                    if known is not None and not restored:
                        known.keep(library)
                    with stage("verify"):
                        verdict = verify()
            microseconds = verdict.pop("microseconds", {})
            with stage("manifest"):
                made_from = source_digest(source, options.seed, digests)
                # What a tuning database has to say is not in the key, nor are buckets.
                keyed = cache is not None and options.db is None and options.buckets is None
                request = request_key(source, machine, options, digests) if keyed else None
                _check_unchanged(source, before, _statuses(found, options))  # the digests are of what was compiled
                kernels = _kernel_records(lowered)
                records = [asdict(record) for record in passes]
                made = write_manifest(directory, machine, made_from, records, kernels, verdict, digests)
        kernels = [{**kernel, "microseconds": microseconds.get(kernel["symbol"])} for kernel in kernels]
        if cache is not None:
            if request is not None:
                remember(cache, request, made)
            cache.prune()
        problems = [*warnings, *(cache.problems if cache is not None else [])]
        compiled = 0 if restored else len(kernels)
        return CompileResult(final, passes, kernels, seconds, verdict, problems, compiled)

    while True:
        try:
            return attempt()
        except UnfitWeightError as error:
            unpacked.add(error.call)
            warnings.append(f"{error.parameter} and all weights of its kind stay plain: {error.reason}")


def _statuses(files: ModelFiles, options: CompileOptions) -> dict[str, dict[str, int]]:
    """What the file system says of the files that a compile reads; whoever reads one says that it is missing."""
    places = {name: files.directory / name for name in files.all(options.seed is None)}
    return {name: status_of(place) for name, place in places.items() if place.exists()}


def _check_unchanged(source: Path, before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> None:
    if changed := sorted(name for name in before | after if before.get(name) != after.get(name)):
        raise ModelError(f"{source}: {', '.join(changed)} changed while it was compiled; compile it again")


def _unless_failed(built: Future[None], evaluate: Callable[[Any], torch.Tensor], weight: Any) -> torch.Tensor:
    """A weight, unless the kernels have failed meanwhile: then why."""
    if built.done():
        built.result()
    return evaluate(weight)


def lower_model(model: Path, machine: Target, dtype: str | None = None, lossless: bool = True) -> Lowered:
    """A model's kernels as `compile_model` would choose them without a tuning database; weights are made up.

    `lossless` admits kernels that read losslessly packed weights.

    Raises:
        ModelError, UnsupportedError: see `compile_model`.
    """
    module, _ = run_passes(read_model(find_files(model), dtype, dummy_seed=0).module, operators=operators(machine))
    return lower(module, lambda spec: choose(spec, machine, lossless))


def fuse_model(
    config: Any,
    dtype: str,
    after_each: Callable[[str, tvm.IRModule], None] = lambda name, module: None,
    operators: Collection[str] = (),
) -> tuple[tvm.IRModule, list[PassRecord]]:
    """A model after all passes, from its configuration alone; arguments are those of `run_passes`.

    Raises:
        UnsupportedError: see `compile_model`.
    """
    imported = import_model(trace(config, DTYPES[dtype]), max_positions(config))
    return run_passes(imported.module, after_each, operators)


def _buckets(path: Path | None, machine: Target) -> BucketPlan | None:
    """The plan in a bucket file, if one is named.

    Raises:
        BucketError: it is damaged.
        TargetError: the target has no use for it.
    """
    if path is None:
        return None
    if machine.name not in gaudi.TARGETS:
        raise TargetError(f"buckets are for targets whose graphs are static ({', '.join(gaudi.TARGETS)})")
    return read_buckets(path)


def _tuned(url: str | None, machine: Target) -> Tuned | None:
    """The tuning database at `url`, if one is named."""
    if url is None:
        return None
    try:
        from .schedules.database.tuned import open_tuned
    except ModuleNotFoundError as error:
        raise DatabaseError(f"the tuning database needs {error.name}; pip install 'vllm-compile[tune]'") from error
    return open_tuned(url, machine)


def _dumper(directory: Path | None) -> Callable[[str, tvm.IRModule], None]:
    """Writes the module after each pass to a numbered file."""
    if directory is None:
        return lambda name, module: None
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{directory}: cannot be written ({error.strerror})") from error
    written: list[str] = []

    def dump(name: str, module: tvm.IRModule) -> None:
        (directory / f"{len(written):02d}_{name}.py").write_text(module.script(show_meta=True))
        written.append(name)

    return dump


def _check_matches(passes: list[PassRecord], strict: bool) -> list[str]:
    idle = [record.name for record in passes if record.matches == 0 and record.name not in OPTIONAL]
    if idle and strict:
        raise UnsupportedError(f"passes matched nothing: {', '.join(idle)} (--strict)")
    return [f"pass {name} matched nothing" for name in idle]


def _prim_funcs(lowered: Lowered, target: Target) -> dict[str, tirx.PrimFunc]:
    return {
        symbol: kernels.choice.family.build(kernels.spec, variant.config, target)
        for kernels in lowered.kernels.values()
        for symbol, variant in sorted(kernels.distinct().items())
    }


def _kernel_records(lowered: Lowered) -> list[dict[str, Any]]:
    """One record per kernel: what it computes, by which family and configuration."""
    return [
        {
            "op": kernels.spec.op,
            "family": kernels.choice.family.name,
            "symbol": symbol,
            "min_tokens": variant.min_tokens,
            "config": dict(variant.config),
            "record": variant.record,
            "passed_over": variant.passed_over,
            "inputs": {name: [*map(str, spec.shape), spec.dtype] for name, spec in kernels.spec.inputs},
        }
        for kernels in lowered.kernels.values()
        for symbol, variant in sorted(kernels.distinct().items(), key=lambda item: item[1].min_tokens)
    ]
