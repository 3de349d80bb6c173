"""The manifest of an artifact: what is in it, what it was made from, and where it may run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_compile.errors import ArtifactError
from vllm_compile.targets import cpu, cuda, gaudi, rocm

from . import gpu, kfd

SCHEMA = 2  # since prompts within windows have a kernel of ours: those of 1 ask FlashAttention for it
MANIFEST, PLAN, LIBRARY, CONFIG = "manifest.json", "plan.json", "kernels.so", "config.json"
TPC_SOURCES = "tpc.zip"  # instead of a library, where kernels are compiled by the chip's own tools
BUCKETS = "buckets.json"
CHUNK = 1 << 22


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of the artifact in `directory`, fit for this version.

    Raises:
        ArtifactError: no artifact, or another schema.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        schema = manifest["schema"]
    except FileNotFoundError as error:
        raise ArtifactError(f"{directory}: no compiled artifact here ({MANIFEST} is missing)") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{directory / MANIFEST}: not a manifest ({error})") from error
    if schema != SCHEMA:
        raise ArtifactError(
            f"{directory}: artifact schema {schema}, this version of vllm-compile reads {SCHEMA}; "
            + ("update vllm-compile" if schema > SCHEMA else "compile the model again")
        )
    try:
        intact = {"name", "features"} <= manifest["target"].keys() and manifest["digest"] == content_digest(manifest)
    except (AttributeError, KeyError, TypeError) as error:
        raise ArtifactError(f"{directory / MANIFEST}: not a manifest ({error})") from error
    if not intact:
        raise ArtifactError(f"{directory / MANIFEST} differs from what was compiled; compile the model again")
    return manifest


def library_of(target: str) -> str:
    """Name of the file that holds the kernels of an artifact for a target."""
    return TPC_SOURCES if target in gaudi.TARGETS else LIBRARY


def check_machine(directory: Path, manifest: dict[str, Any]) -> None:
    """Check that this machine can run the artifact's kernels; see `check_target`."""
    check_target(manifest["target"]["name"], manifest["target"]["features"], directory)


def check_target(name: str, features: Iterable[str], directory: Path) -> None:
    """Check that this machine can run what is compiled in `directory` for the target `name` with these features.

    Raises:
        ArtifactError: it is a CPU without the instruction sets they use.
        TargetError: there is no GPU, or another one, or its driver is too old.
    """
    if name in gaudi.TARGETS:
        return  # without a Gaudi, its program runs on the CPU
    if name == cuda.NAME:
        card = gpu.detect()
        cuda.require(card.capability, card.driver, card.name)
    elif name == rocm.NAME:
        (compiled,) = features
        rocm.require(kfd.detect().name, compiled)
    elif missing := set(features) - cpu.host_features():
        raise ArtifactError(
            f"{directory}: compiled for a CPU with {', '.join(sorted(missing))}, which this machine lacks; "
            "compile the model again on a machine like this one"
        )


def content_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 of everything a manifest says but when and where it was built."""
    content = {key: value for key, value in manifest.items() if key not in ("digest", "built")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def is_weights(name: str) -> bool:
    """True for the files that hold weights, which are most of an artifact's bytes."""
    return name.endswith(".safetensors")


def check_files(
    directory: Path,
    manifest: dict[str, Any],
    which: Callable[[str], bool] = lambda name: True,
    digest: Callable[[Path], str] = sha256,
) -> None:
    """Compare files with their SHA-256 in the manifest: those whose name `which` is true of.

    `digest` gives the SHA-256 of a file.

    Raises:
        ArtifactError: a file is missing or differs; it is named.
    """
    expected = {name: known for name, known in manifest["files"].items() if which(name)}
    absent = [name for name in expected if not (directory / name).is_file()]
    if absent:
        raise ArtifactError(f"{directory}: {', '.join(absent)} is missing; compile the model again")
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        found = dict(zip(expected, pool.map(lambda name: digest(directory / name), expected), strict=True))
    changed = [name for name, known in expected.items() if found[name] != known]
    if changed:
        raise ArtifactError(
            f"{directory}: {', '.join(changed)} differs from what was compiled (SHA-256); compile the model again"
        )
