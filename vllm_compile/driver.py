"""From a model directory to an artifact: the stages in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tvm
from tvm import tirx

from .artifact import source_digest, write_config, write_manifest
from .cache import Cache
from .compilation import CompileOptions, CompileResult, model_files, remember, request_key
from .errors import ArtifactError, DatabaseError, ModelError, TargetError, UnsupportedError
from .file_digests import FileDigests, status_of
from .frontend.checkpoint import Checkpoint, DummyCheckpoint
from .frontend.conversion import open_checkpoint
from .frontend.families import max_positions
from .frontend.hf import TracedModel, read_config, trace
from .frontend.importer import ImportedModel, import_model
from .kernel_cache import KernelCache
from .lowering import Lowered, dimension, lower
from .quick_verification import Verdict, not_run, quick_verification
from .relax_passes.outline_layers import FORWARD, LOGITS
from .relax_passes.pipeline import OPTIONAL, run_passes
from .relax_passes.record import PassRecord
from .runtime import manifest as files
from .runtime.buckets import BucketPlan, read_buckets
from .runtime.manifest import check_target
from .runtime.plan import ModelShape, Plan
from .schedules.build import build_library
from .schedules.family import Tuned
from .schedules.select import choose
from .spec import OpSpec
from .staging import staged
from .targets import Target, gaudi, resolve
from .weights import UnfitWeightError, WeightProgram, write_shards

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def compile_model(
    model: str | Path,
    target: str = "cpu",
    out: str | Path = "artifact",
    options: CompileOptions | None = None,
    progress: Callable[[str], None] = lambda stage: None,
    cache: Cache | None = None,
) -> CompileResult:
    """Compile a Hugging Face model directory into an artifact that vLLM serves.

    Args:
        model: directory with config.json, safetensors and tokenizer.
        target: what to compile for; `cpu` is the machine this runs on.
        out: the artifact's directory; an older artifact there is replaced when the new one is whole.
        options: see `CompileOptions`.
        progress: called with the name of each stage as it starts.
        cache: where kernels and digests of files are looked up and kept, or None.

    Raises:
        ModelError: the model directory is missing, incomplete or damaged.
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
    config = read_config(source)
    digests = FileDigests(cache)
    before = _statuses(source, options)
    dtype = dtype_of(config, options.dtype)
    with stage("import"):
        traced = trace(config, DTYPES[dtype])
        checkpoint = open_checkpoint(source, traced.shapes, DTYPES[dtype], options.seed, traced.conversions)
        imported = import_model(traced, max_positions(config))
        _check_tensors(source, traced, imported, checkpoint)
    with stage("passes"):
        module, passes = run_passes(imported.module, _dumper(Path(options.dump) if options.dump else None))
        warnings = _check_matches(passes, options.strict)
    weights = WeightProgram(module, _reader(traced, imported, checkpoint))
    unpacked: set[OpSpec] = set()  # calls one of whose weights does not fit the lossless format

    tuned = _tuned(options.db, machine)

    def attempt() -> CompileResult:
        lossless = options.pack == "lossless"
        with stage("lowering"):
            lowered = lower(module, lambda spec: choose(spec, machine, lossless and spec not in unpacked, tuned))
        with staged(final) as directory:
            plan = Plan(_model_shape(config, module, dtype), lowered.functions, lowered.restored)
            (directory / files.PLAN).write_text(plan.to_json())
            write_config(source, dtype, directory)
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
                with _verification(directory, source, machine, options) as verify:
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
                _check_unchanged(source, before, _statuses(source, options))  # the digests are of what was compiled
                kernels = _kernel_records(lowered)
                records = [asdict(record) for record in passes]
                made = write_manifest(directory, machine, made_from, records, kernels, verdict, digests)
        kernels = [{**kernel, "microseconds": microseconds.get(kernel["symbol"])} for kernel in kernels]
        if cache is not None:
            if request is not None:
                remember(cache, request, made)
            cache.prune()
        found = [*warnings, *(cache.problems if cache is not None else [])]
        compiled = 0 if restored else len(kernels)
        return CompileResult(final, passes, kernels, seconds, verdict, found, compiled)

    while True:
        try:
            return attempt()
        except UnfitWeightError as error:
            unpacked.add(error.call)
            warnings.append(f"{error.parameter} and all weights of its kind stay plain: {error.reason}")


def _statuses(source: Path, options: CompileOptions) -> dict[str, dict[str, int]]:
    """What the file system says of the files that a compile reads."""
    return {name: status_of(source / name) for name in model_files(source, options)}


def _check_unchanged(source: Path, before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> None:
    if changed := sorted(name for name in before | after if before.get(name) != after.get(name)):
        raise ModelError(f"{source}: {', '.join(changed)} changed while it was compiled; compile it again")


def _unless_failed(built: Future[None], evaluate: Callable[[Any], torch.Tensor], weight: Any) -> torch.Tensor:
    """A weight, unless the kernels have failed meanwhile: then why."""
    if built.done():
        built.result()
    return evaluate(weight)


def lower_model(model: Path, machine: Target, dtype: str | None = None) -> Lowered:
    """A model's kernels as `compile_model` would choose them without a tuning database; no weight is read.

    Raises:
        ModelError, UnsupportedError: see `compile_model`.
    """
    config = read_config(model)
    module, _ = fuse_model(config, dtype_of(config, dtype))
    return lower(module, lambda spec: choose(spec, machine))


def fuse_model(
    config: Any, dtype: str, after_each: Callable[[str, tvm.IRModule], None] = lambda name, module: None
) -> tuple[tvm.IRModule, list[PassRecord]]:
    """A model after all passes, from its configuration alone; `after_each` sees the module behind every pass.

    Raises:
        UnsupportedError: see `compile_model`.
    """
    imported = import_model(trace(config, DTYPES[dtype]), max_positions(config))
    return run_passes(imported.module, after_each)


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


def _verification(
    directory: Path, source: Path, machine: Target, options: CompileOptions
) -> AbstractContextManager[Callable[[], Verdict]]:
    """The quick verification, or why it is not run; what it yields gives the verdict once the kernels are there."""
    if options.weightless:
        return not_run("compiled without weights")
    try:
        check_target(machine.name, machine.features, directory)
    except TargetError as error:
        return not_run(str(error))
    return quick_verification(directory, source, machine.name, options.dummy_weights)


def dtype_of(config: Any, asked: str | None) -> str:
    """What a model is computed in: what is asked for, else its own dtype; UnsupportedError if we cannot."""
    if quantization := getattr(config, "quantization_config", None):
        given = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = given.get("quant_method", "unknown")
        raise UnsupportedError(f"checkpoints quantised by {method} are not supported yet; compile the original weights")
    dtype = asked or str(getattr(config, "dtype", None) or torch.float32).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UnsupportedError(f"dtype {dtype} is not supported; pass --dtype bfloat16 or float32")
    return dtype


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
            "inputs": {name: [*map(str, spec.shape), spec.dtype] for name, spec in kernels.spec.inputs},
        }
        for kernels in lowered.kernels.values()
        for symbol, variant in sorted(kernels.distinct().items(), key=lambda item: item[1].min_tokens)
    ]


def _check_tensors(
    source: Path, traced: TracedModel, imported: ImportedModel, checkpoint: Checkpoint | DummyCheckpoint
) -> None:
    """Miss a tensor, or find one of another shape than the configuration's, before the kernels are built."""
    stored = {n: [alias for alias in traced.aliases[n] if alias in checkpoint] for n in imported.weights.values()}
    if missing := sorted(name for name, found in stored.items() if not found):
        raise ModelError(f"{source}: tensors missing in its safetensors: {', '.join(missing[:5])}")
    for name, found in stored.items():
        expected = next(traced.shapes[alias] for alias in traced.aliases[name] if alias in traced.shapes)
        for alias in found:
            if (shape := checkpoint.shape(alias)) != expected:
                tied = f", being tied to {found[0]}" if alias != found[0] else ""
                raise ModelError(
                    f"{alias}: shape {list(shape)} in the checkpoint, config.json says {list(expected)}{tied}"
                )


def _reader(
    traced: TracedModel, imported: ImportedModel, checkpoint: Checkpoint | DummyCheckpoint
) -> Callable[[str], torch.Tensor]:
    """Gives the tensor of a parameter of the imported module: a position table or a checkpoint's weight."""

    def read(parameter: str) -> torch.Tensor:
        if parameter in imported.tables:
            return imported.tables[parameter]
        name = imported.weights[parameter]
        # Tied weights are one tensor under several names; a checkpoint may hold either.
        return checkpoint.read(next((n for n in traced.aliases[name] if n in checkpoint), name))

    return read


def _model_shape(config: Any, module: tvm.IRModule, dtype: str) -> ModelShape:
    """Shapes as the compiled functions have them; heads of queries as the configuration says."""
    forward, logits = module[FORWARD], module[LOGITS]
    caches = {tuple(map(dimension, p.ty.shape.values)) for p in forward.params if p.name.startswith("kv_")}
    if len(caches) != 1:
        raise UnsupportedError(f"{config.model_type}: layers whose KV caches have different shapes are not supported")
    (_, num_kv_heads, _, width) = caches.pop()
    return ModelShape(
        num_layers=sum(p.name.startswith("kv_") for p in forward.params),
        num_heads=config.num_attention_heads,
        num_kv_heads=int(num_kv_heads),
        head_dim=int(width) // 2,
        hidden_size=int(forward.ret_ty.shape.values[-1]),
        vocab_size=int(logits.ret_ty.shape.values[-1]),
        max_positions=max_positions(config),
        dtype=dtype,
    )
