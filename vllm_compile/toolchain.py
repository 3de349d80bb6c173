"""What compiles: versions of the programs and libraries, and digests of this package's own sources.

Keys of the cache are made of these.  Imports neither TVM nor torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .errors import TargetError
from .targets import Target, cuda

SUBPACKAGES = ("relax_passes", "runtime", "schedules", "targets")  # which lie elsewhere in a checkout
SOURCES = frozenset({".py", ".c", ".cuh", ".json"})
# All that kernels are built by, with schedules/*.py and schedules/TARGET.
KERNEL_SOURCES = frozenset({"errors.py", "expression.py", "lossless.py", "spec.py", "targets", "toolchain.py"})
KERNEL_LIBRARIES = ("apache-tvm", "apache-tvm-ffi")
COMPILE_LIBRARIES = (*KERNEL_LIBRARIES, "torch", "transformers", "safetensors")
# Variables by which gcc and nvcc make other code of the same sources (their manuals); they run without them, so that
# what they make depends on the sources alone.
CODE_VARIABLES = frozenset(
    {
        "CPATH",
        "C_INCLUDE_PATH",
        "CPLUS_INCLUDE_PATH",
        "COMPILER_PATH",
        "GCC_EXEC_PREFIX",
        "LIBRARY_PATH",
        "NVCC_APPEND_FLAGS",
        "NVCC_PREPEND_FLAGS",
        "NVCC_CCBIN",
        "SOURCE_DATE_EPOCH",
    }
)


def find_gcc() -> str:
    """The C compiler of the path.

    Raises:
        TargetError: there is none.
    """
    gcc = shutil.which("gcc")
    if gcc is None:
        raise TargetError("gcc was not found; it links the compiled kernels (apt-get install gcc)")
    return gcc


def find_nvcc() -> str:
    """CUDA's compiler, of $CUDA_HOME or the path.

    Raises:
        TargetError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")
    if nvcc is None:
        raise TargetError("nvcc was not found; compiling for CUDA needs CUDA's toolkit 13.0 (or set CUDA_HOME); no GPU")
    return nvcc


def environment() -> dict[str, str]:
    """What compilers are run in: this process's variables, without those that change code."""
    return {name: value for name, value in os.environ.items() if name not in CODE_VARIABLES}


def kernel_toolchain(target: Target) -> dict[str, Any]:
    """What a library of kernels for `target` depends on, besides what the kernels are.

    Raises:
        TargetError: a compiler that the target needs is missing.
    """
    compilers = [find_gcc(), *([find_nvcc()] if target.name == cuda.NAME else [])]
    return {
        "target": {**asdict(target), "features": sorted(target.features), "tvm": target.tvm_config()},
        "compilers": [_version_of(compiler) for compiler in compilers],
        "libraries": {name: version(name) for name in KERNEL_LIBRARIES},
        "sources": digest_of(path for path in source_files() if _builds_kernels(path, target)),
    }


def compile_toolchain(target: Target) -> dict[str, Any]:
    """What an artifact for `target` depends on, besides the model and the options; see `kernel_toolchain`."""
    return kernel_toolchain(target) | {
        "libraries": {name: version(name) for name in COMPILE_LIBRARIES},
        "python": platform.python_version(),
        "sources": digest_of(source_files()),
    }


def source_files() -> dict[Path, Path]:
    """This package's sources: the place of each in the package, and the file."""
    folders = {"": Path(__file__).parent}
    folders |= {name: Path(import_module(f"{__package__}.{name}").__path__[0]) for name in SUBPACKAGES}
    return {
        Path(name) / path.relative_to(folder): path
        for name, folder in folders.items()
        for path in folder.rglob("*")
        if path.suffix in SOURCES
    }


def digest_of(places: Iterable[Path]) -> str:
    """SHA-256 over names and contents of some of the package's sources."""
    files, digest = source_files(), hashlib.sha256()
    for place in sorted(places):
        content = hashlib.sha256(files[place].read_bytes()).hexdigest()
        digest.update(f"{content}  {place}\n".encode())
    return digest.hexdigest()


def _builds_kernels(place: Path, target: Target) -> bool:
    if place.parts[0] == "schedules":
        return len(place.parts) == 2 or place.parts[1] == target.name
    return place.parts[0] in KERNEL_SOURCES


def _version_of(compiler: str) -> str:
    """What a compiler says of itself; not where it is."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise TargetError(f"{compiler} --version failed: {done.stderr.strip()}")
    return done.stdout
