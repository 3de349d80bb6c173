"""What compiles: versions of the programs and libraries, and digests of this package's own sources.

Keys of the cache are made of these.  Imports neither TVM nor torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import TargetError
from .targets import Target, cuda, gaudi, rocm

SUBPACKAGES = ("relax_passes", "runtime", "schedules", "targets")  # which lie elsewhere in a checkout
SOURCES = frozenset({".py", ".c", ".cuh", ".json", ".jinja"})
# All that kernels are built by, with schedules/*.py and schedules/TARGET.
KERNEL_SOURCES = frozenset(
    {
        "canonical.py",
        "errors.py",
        "expression.py",
        "fused_calls.py",
        "lossless.py",
        "spec.py",
        "targets",
        "toolchain.py",
    }
)
ROCM_SOURCES = frozenset({Path("runtime/__init__.py"), Path("runtime/hip.c")})  # the launcher, which libraries hold
TVM_LLVM = 22  # the LLVM in apache-tvm's wheel
OLDEST_LLD = 19  # the first that links version 6 of the code object ABI, which LLVM 22 writes
ROCM_LLD = "/opt/rocm/llvm/bin/ld.lld"
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


def find_lld() -> list[str]:
    """The command of a linker that knows TVM's objects: of the distribution, of ROCm, or in the wheel `ziglang`.

    Raises:
        TargetError: there is none.
    """
    numbered = (f"ld.lld-{number}" for number in range(TVM_LLVM, OLDEST_LLD - 1, -1))
    for name in (*numbered, "ld.lld", ROCM_LLD):
        if (path := shutil.which(name)) and _lld_version(path) >= OLDEST_LLD:
            return [path]
    if find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "ld.lld"]
    raise TargetError(
        f"no ld.lld of LLVM {OLDEST_LLD} or later was found, which links kernels for AMD GPUs: "
        f"apt-get install lld-{OLDEST_LLD}, or pip install ziglang"
    )


def _lld_version(path: str) -> int:
    """The major version of the linker there, or 0 if it does not tell."""
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"LLD (\d+)", done.stdout)
    return int(found[1]) if found else 0


def environment() -> dict[str, str]:
    """What compilers are run in: this process's variables, without those that change code."""
    return {name: value for name, value in os.environ.items() if name not in CODE_VARIABLES}


def kernel_toolchain(target: Target) -> dict[str, Any]:
    """What a library of kernels for `target` depends on, besides what the kernels are.

    Raises:
        TargetError: a compiler that the target needs is missing.
    """
    compilers = [] if target.name in gaudi.TARGETS else [[find_gcc()]]
    if target.name == cuda.NAME:
        compilers.append([find_nvcc()])
    if target.name == rocm.NAME:
        compilers.append(find_lld())
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
        folder = "gaudi" if target.name in gaudi.TARGETS else target.name
        return len(place.parts) == 2 or place.parts[1] == folder
    return place.parts[0] in KERNEL_SOURCES or (target.name == rocm.NAME and place in ROCM_SOURCES)


def _version_of(command: Sequence[str]) -> str:
    """What a compiler says of itself; not where it is."""
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise TargetError(f"{' '.join(command)} --version failed: {done.stderr.strip()}")
    return done.stdout
