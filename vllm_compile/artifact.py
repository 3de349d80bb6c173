"""Writes the descriptive files of an artifact: config.json, tokenizer, manifest."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import __version__
from .file_digests import FileDigests
from .model_files import ModelFiles, find_files
from .runtime import manifest as files
from .targets import Target

ARCHITECTURE = "VllmCompileForCausalLM"


def write_config(fields: dict[str, Any], source: ModelFiles, dtype: str, directory: Path) -> None:
    """The model's config.json under our architecture, and its tokenizer files as they are.

    `auto_map`, which names code to run, is left out.
    """
    config = dict(fields)
    config.pop("auto_map", None)
    config.pop("torch_dtype", None)
    original = config.get("architectures")
    config |= {"architectures": [ARCHITECTURE], "dtype": dtype, "vllm_compile": {"architectures": original}}
    (directory / files.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in source.copied():
        shutil.copyfile(source.directory / name, directory / name)


def write_plain_config(artifact: Path, directory: Path) -> None:
    """The config.json that an artifact was made from, under its own architecture again."""
    config = json.loads((artifact / files.CONFIG).read_text())
    config["architectures"] = config.pop("vllm_compile")["architectures"]
    (directory / files.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def source_digest(source: Path, dummy_seed: int | None, digests: FileDigests) -> dict[str, Any]:
    """What the artifact was made from: SHA-256 over the names and digests of config and weights."""
    files = find_files(source)
    names = files.described(with_weights=dummy_seed is None)
    listing = "".join(f"{digests.sha256(files.directory / name)}  {name}\n" for name in names)
    return {"sha256": hashlib.sha256(listing.encode()).hexdigest(), "dummy_weights_seed": dummy_seed}


def write_manifest(
    directory: Path,
    target: Target,
    source: dict[str, Any],
    passes: list[dict[str, Any]],
    kernels: list[dict[str, Any]],
    verdict: dict[str, Any],
    digests: FileDigests,
) -> str:
    """Describe all files in `directory`; only the field `built` differs between two equal compiles.

    Returns the digest of its content, that field left out.
    """
    manifest: dict[str, Any] = {
        "schema": files.SCHEMA,
        "compiler": {"vllm_compile": __version__, "tvm": version("apache-tvm")},
        "source": source,
        "target": target.described(),
        "abi": {"apache_tvm_ffi": ">=0.1.10"},
        "passes": passes,
        "kernels": kernels,
        "verdict": verdict,
        "files": {path.name: digests.sha256(path) for path in sorted(directory.iterdir())},
        "built": {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "host": platform.node()},
    }
    manifest["digest"] = files.content_digest(json.loads(json.dumps(manifest)))
    (directory / files.MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return str(manifest["digest"])
