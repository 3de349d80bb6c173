"""What keys are made of: all that kernels and artifacts depend on, and nothing else."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rocm_on_host import needs_lld
from vllm_compile import toolchain
from vllm_compile.cache import key_of
from vllm_compile.errors import TargetError
from vllm_compile.targets import cpu, cuda, rocm

TARGETS = {"cpu": cpu.for_features(cpu.AVX2), "cuda": cuda.for_chip(), "rocm": rocm.for_arch()}
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
BOTH = ["cpu", pytest.param("cuda", marks=needs_nvcc)]
NO_PYTHON = {"cpu": {"parallel.c"}, "cuda": {"norm.cuh", "wgmma.cuh", "records.json"}, "rocm": {"hip.c"}}
IMPORTED = """
import json, sys
import vllm_compile.schedules.{target}, vllm_compile.schedules.{target}.build
files = [m.__file__ for name, m in sys.modules.items() if name.split(".")[0] == "vllm_compile"]
print(json.dumps(files))
"""


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The package's sources as copies, which a test may change."""
    copies = {place: tmp_path / place for place in toolchain.source_files()}
    for place, file in toolchain.source_files().items():
        copies[place].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copies[place])
    monkeypatch.setattr(toolchain, "source_files", lambda: copies)
    return copies


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("name", TARGETS)
def test_all_that_kernels_are_built_by_is_in_the_digest(name):
    command = [sys.executable, "-c", IMPORTED.format(target=name)]
    imported = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    digested = {
        str(f) for place, f in toolchain.source_files().items() if toolchain._builds_kernels(place, TARGETS[name])
    }
    # The package itself has no code for kernels: its __init__.py is the public API.
    assert set(imported) - digested == {str(Path(toolchain.__file__).with_name("__init__.py"))}
    assert {Path(path).name for path in digested} >= NO_PYTHON[name]


def test_every_source_is_known():
    root = Path(__file__).parents[1]
    for folder in ("vllm_compile", *toolchain.SUBPACKAGES):
        tracked = subprocess.run(["git", "ls-files", folder], cwd=root, capture_output=True, text=True).stdout.split()
        known = {str(file.relative_to(root)) for file in toolchain.source_files().values()}
        assert {name for name in tracked if (root / name).exists()} <= known


@needs_nvcc
@needs_lld
@pytest.mark.parametrize(
    ("place", "changed"),
    [
        ("schedules/cpu/matmul.py", {"cpu"}),
        ("schedules/cpu/parallel.c", {"cpu"}),
        ("schedules/cuda/norm.cuh", {"cuda"}),
        ("schedules/cuda/build.py", {"cuda"}),
        ("schedules/rocm/matmul.py", {"rocm"}),
        ("runtime/hip.c", {"rocm"}),
        ("schedules/family.py", {"cpu", "cuda", "rocm"}),
        ("schedules/tuning/search.py", set()),
        ("lossless.py", {"cpu", "cuda", "rocm"}),
        ("cli.py", set()),
        ("relax_passes/merge_qkv.py", set()),
    ],
)
def test_sources(copied, place, changed):
    before = {name: toolchain.kernel_toolchain(target) for name, target in TARGETS.items()}
    whole = toolchain.compile_toolchain(TARGETS["cpu"])
    change(copied[Path(place)])
    assert {name for name, t in TARGETS.items() if toolchain.kernel_toolchain(t) != before[name]} == changed
    assert toolchain.compile_toolchain(TARGETS["cpu"]) != whole, "any source may change an artifact"


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("library", ["apache-tvm", "apache-tvm-ffi", "torch", "transformers"])
def test_versions_of_libraries(name, library, monkeypatch):
    before, version = keys(name), toolchain.version
    monkeypatch.setattr(toolchain, "version", lambda of: "0" if of == library else version(of))
    kernels, artifact = keys(name)
    assert (kernels != before[0]) == (library in toolchain.KERNEL_LIBRARIES)
    assert artifact != before[1]


@pytest.mark.parametrize("name", BOTH)
def test_versions_of_compilers(name, tmp_path, monkeypatch):
    before = keys(name)
    for compiler in ("gcc", "nvcc"):
        (tmp_path / compiler).write_text("#!/bin/sh\necho another version\n")
        (tmp_path / compiler).chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    after = keys(name)
    assert after[0] != before[0]
    assert after[1] != before[1]
    (tmp_path / "gcc").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(TargetError, match="gcc --version failed"):
        keys(name)


def test_version_of_the_linker(tmp_path, monkeypatch):
    found = []
    for number in (20, 21):
        for name, says in (("gcc", "gcc 12"), ("ld.lld", f"LLD {number}.1.0")):
            (tmp_path / name).write_text(f"#!/bin/sh\necho {says}\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        found.append(toolchain.kernel_toolchain(TARGETS["rocm"]))
    assert found[0] != found[1]


@pytest.mark.parametrize("name", BOTH)
def test_every_fact_of_a_target(name):
    target = TARGETS[name]
    others = {"tvm": (("kind", "else"),), "features": frozenset({"else"}), "arch": "sm_100a"}
    facts = [field.name for field in dataclasses.fields(target) if field.name != "name"]
    changed = [dataclasses.replace(target, **{fact: others.get(fact, 7)}) for fact in facts]
    assert len({key_of(toolchain.kernel_toolchain(other)) for other in [target, *changed]}) == 1 + len(facts) >= 6


@pytest.mark.parametrize("name", BOTH)
def test_nothing_else_of_the_environment(name, tmp_path, monkeypatch):
    before = keys(name)
    for variable in ("NVCC_APPEND_FLAGS", "CPATH", "LANG", "OMP_NUM_THREADS", "TVM_LOG_DEBUG", "HOME", "ANYTHING"):
        monkeypatch.setenv(variable, "/nonsense")
    monkeypatch.chdir(tmp_path)
    # The same compilers in another place.
    for compiler in ("gcc", "nvcc"):
        if found := shutil.which(compiler):
            (tmp_path / compiler).write_text(f'#!/bin/sh\nexec {found} "$@"\n')
            (tmp_path / compiler).chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert keys(name) == before


def test_compilers_do_not_see_what_would_change_code(monkeypatch):
    """Else the cache would hand on one user's flags to another."""
    for variable in toolchain.CODE_VARIABLES:
        monkeypatch.setenv(variable, "x")
    monkeypatch.setenv("CUDA_HOME", "y")
    assert not toolchain.CODE_VARIABLES & set(toolchain.environment())
    assert toolchain.environment()["CUDA_HOME"] == "y"


def keys(name: str) -> tuple[str, str]:
    """Of kernels, and of artifacts."""
    return key_of(toolchain.kernel_toolchain(TARGETS[name])), key_of(toolchain.compile_toolchain(TARGETS[name]))
