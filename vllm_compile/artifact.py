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
from .runtime import manifest as files
from .targets import Target

ARCHITECTURE = "VllmCompileForCausalLM"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template*",
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def write_config(source: Path, dtype: str, directory: Path) -> None:
    """The model's config.json under our architecture, and its tokenizer files as they are.

    `auto_map`, which names code to run, is left out.
    """
    config = json.loads((source / "config.json").read_text())
    config.pop("auto_map", None)
    config.pop("torch_dtype", None)
    original = config.get("architectures")
    config |= {"architectures": [ARCHITECTURE], "dtype": dtype, "vllm_compile": {"architectures": original}}
    (directory / files.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in copied_files(source):
        shutil.copyfile(source / name, directory / name)


def write_plain_config(artifact: Path, directory: Path) -> None:
    """The config.json that an artifact was made from, under its own architecture again."""
    config = json.loads((artifact / files.CONFIG).read_text())
    config["architectures"] = config.pop("vllm_compile")["architectures"]
    (directory / files.CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copied_files(source: Path) -> list[str]:
    """Names of the model's files that an artifact has too: the tokenizer and what belongs to it."""
    return sorted({path.name for pattern in TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()})


def weight_files(source: Path) -> list[str]:
    """Names of the files that hold a checkpoint's weights, and of those that say which is in which."""
    return sorted(path.name for pattern in WEIGHT_FILES for path in source.glob(pattern))


def source_digest(source: Path, dummy_seed: int | None, digests: FileDigests) -> dict[str, Any]:
    """What the artifact was made from: SHA-256 over the names and digests of config and weights."""
    names = ["config.json"] if dummy_seed is not None else ["config.json", *weight_files(source)]
    listing = "".join(f"{digests.sha256(source / name)}  {name}\n" for name in names)
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
        "target": {"name": target.name, "features": sorted(target.features), "tvm": target.tvm_config()},
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
