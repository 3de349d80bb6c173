"""Compiling again: what is known is not done twice, what has changed is, and the artifact is the same either way."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

import vllm_compile
from tests import models
from tests.conftest import SEED
from vllm_compile import driver, unchanged
from vllm_compile.cache import Cache
from vllm_compile.compilation import CompileOptions, request_key
from vllm_compile.errors import ModelError
from vllm_compile.file_digests import FileDigests, status_of
from vllm_compile.quick_verification import not_run
from vllm_compile.runtime.manifest import check_files, read_manifest
from vllm_compile.targets import resolve
from vllm_compile.unchanged import find_unchanged

TARGET = resolve("cpu")
# Says what was imported besides, and what it took of the processor.
COMPILE = """
import json, sys, time
from vllm_compile.cli import main
code = main(["compile", "--json", *sys.argv[1:]])
large = sorted({"torch", "tvm", "transformers"} & set(sys.modules))
print(json.dumps({"imported": large, "seconds": time.process_time()}))
sys.exit(code)
"""


def start(*arguments: object, **variables: str) -> subprocess.Popen:
    """A compile in a process of its own."""
    command = [sys.executable, "-c", COMPILE, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables})


def finish(process: subprocess.Popen) -> tuple[dict, dict]:
    """Its summary; which of the large packages it `imported`, and how many `seconds` of a processor's time it took."""
    *_, summary, took = process.communicate()[0].splitlines()
    assert process.returncode == 0
    return json.loads(summary), json.loads(took)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("unchanged")


@pytest.fixture(scope="module")
def both(tiny, folder):
    """One model compiled by two processes at once, which share an empty cache."""
    processes = [start("--model", tiny, "--out", folder / n, "--cache", folder / "cache") for n in ("one", "two")]
    finished = [finish(process) for process in processes]
    assert all(took["imported"] for _, took in finished), "as it should be seen where it is compiled"
    return [summary for summary, _ in finished]


def contents(artifact: Path) -> dict[str, bytes]:
    """Of all files, the manifest without the one field that may differ."""
    found = {path.name: path.read_bytes() for path in artifact.iterdir()}
    manifest = json.loads(found["manifest.json"])
    del manifest["built"]
    return found | {"manifest.json": json.dumps(manifest).encode()}


@pytest.mark.slow
class TestTheWholeWay:
    def test_two_at_once(self, both, folder):
        assert [summary["unchanged"] for summary in both] == [False, False]
        assert all(summary["verdict"]["outcome"] == "pass" and summary["warnings"] == [] for summary in both)
        assert contents(folder / "one") == contents(folder / "two")
        cache = Cache(folder / "cache")
        for entry in cache.entries():
            assert cache.get(entry.kind, entry.key) is not None
        assert [entry.kind for entry in cache.entries()].count("kernels") == 1
        assert cache.problems == []

    def test_same_with_and_without_a_cache(self, both, folder, tiny_fp32):
        assert contents(folder / "one") == contents(tiny_fp32)

    def test_nothing_to_do(self, both, folder, tiny):
        """In another folder, with other variables, and the model under another name."""
        (folder / "link").symlink_to(tiny)
        arguments = ("--model", folder / "link", "--out", folder / "one", "--cache", folder / "cache")
        before = {path: status_of(path) for path in (folder / "one").iterdir()}
        summary, took = finish(start(*arguments, LANG="C", OMP_NUM_THREADS="1", ANYTHING="else"))
        assert summary["unchanged"]
        assert summary["built"] == 0
        assert took["imported"] == [], "TVM's and torch's imports alone take longer than all of it may"
        assert took["seconds"] < 3, "with Python's own start"
        assert summary["seconds"].keys() == {"unchanged"}
        assert {path: status_of(path) for path in (folder / "one").iterdir()} == before
        assert summary["verdict"] == both[0]["verdict"]
        assert summary["passes"] == both[0]["passes"]

    def test_kernels_are_shared_with_other_weights(self, both, folder):
        models.save(folder / "other", SEED + 1, num_hidden_layers=3)
        result = vllm_compile.compile(folder / "other", out=folder / "three", cache=folder / "cache")
        assert not result.unchanged
        assert result.built == 0
        assert result.verdict["outcome"] == "pass"
        assert (folder / "three" / "kernels.so").read_bytes() == (folder / "one" / "kernels.so").read_bytes()


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """A model directory that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def no_kernels(monkeypatch):
    """Counts libraries instead of building them, and does not run them."""
    built = []

    def build(kernels, target, path):
        built.append(sorted(kernels))
        path.write_bytes(b"kernels")

    monkeypatch.setattr(driver, "build_library", build)
    monkeypatch.setattr(
        "vllm_compile.quick_verification.quick_verification", lambda *_: nullcontext(lambda: {"outcome": "pass"})
    )
    return built


@pytest.mark.usefixtures("no_kernels")
class TestWhatChanges:
    @pytest.fixture
    def compile(self, copy, tmp_path):
        def run(**options):
            return vllm_compile.compile(copy, out=tmp_path / "out", cache=tmp_path / "cache", **options)

        return run

    def test_damaged_entry(self, compile, tmp_path, no_kernels):
        compile()
        (entry,) = (tmp_path / "cache" / "kernels").iterdir()
        entry.write_bytes(entry.read_bytes()[:-1] + b"X")
        shutil.rmtree(tmp_path / "out")
        result = compile()
        assert len(no_kernels) == 2
        assert result.built == len(result.kernels) > 0
        (warning,) = result.warnings
        assert "damaged" in warning
        assert (tmp_path / "out" / "kernels.so").read_bytes() == b"kernels"
        assert Cache(tmp_path / "cache").get("kernels", entry.name) == b"kernels", "mended"

    @pytest.mark.parametrize("name", ["kernels.so", "model-00001.safetensors", "plan.json"])
    def test_damaged_artifact(self, compile, tmp_path, name):
        compile()
        path = tmp_path / "out" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        result = compile()
        assert not result.unchanged
        assert any(f"{name} differs" in warning for warning in result.warnings)
        assert path.read_bytes() == whole
        assert compile().unchanged

    def test_missing_file(self, compile, tmp_path):
        compile()
        (tmp_path / "out" / "plan.json").unlink()
        assert not compile().unchanged

    def test_another_model_in_the_same_place(self, compile, copy, no_kernels):
        compile()
        models.save(copy, SEED + 1)
        result = compile()
        assert not result.unchanged
        assert (result.built, len(no_kernels)) == (0, 1)
        assert compile().unchanged

    def test_other_options(self, compile):
        assert not compile().unchanged
        assert not compile(weightless=True).unchanged
        assert compile(weightless=True).unchanged

    def test_a_dump_is_a_reason_to_compile(self, compile, tmp_path):
        compile()
        assert not compile(dump=tmp_path / "dump").unchanged
        assert compile().unchanged

    def test_not_verified_where_it_could_be(self, compile, monkeypatch):
        monkeypatch.setattr("vllm_compile.quick_verification.quick_verification", lambda *_: not_run("no GPU"))
        compile()
        assert not compile().unchanged
        monkeypatch.setattr(unchanged, "_runs_here", lambda *_: False)
        assert compile().unchanged

    def test_a_model_that_changes_meanwhile(self, copy, tmp_path, monkeypatch):
        write = driver.write_config

        def meddle(*arguments):
            write(*arguments)
            (copy / "config.json").touch()

        monkeypatch.setattr(driver, "write_config", meddle)
        with pytest.raises(ModelError, match=r"config\.json changed while it was compiled"):
            vllm_compile.compile(copy, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_without_a_cache_all_is_compiled(self, copy, tmp_path, no_kernels):
        for _ in range(2):
            assert not vllm_compile.compile(copy, out=tmp_path / "out").unchanged
        assert len(no_kernels) == 2
        check_files(tmp_path / "out", read_manifest(tmp_path / "out"))


def key(model: Path, target=TARGET, **options) -> str:
    return request_key(model, target, CompileOptions(**options), FileDigests())


OTHERS = ({"dtype": "bfloat16"}, {"strict": True}, {"dummy_weights": 0}, {"dummy_weights": 1}, {"pack": "none"})


@pytest.mark.parametrize(
    "options",
    [*OTHERS, {"weightless": True}],
    ids=str,
)
def test_options_are_part_of_the_key(tiny, options):
    assert key(tiny, **options) != key(tiny)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"])
def test_files_are_part_of_the_key(copy, name):
    (path,) = copy.glob(name.replace("00002", "*"))
    before = key(copy)
    path.write_bytes(path.read_bytes() + b" ")
    assert key(copy) != before


def test_weights_are_none_where_they_are_not_read(copy):
    before = key(copy, weightless=True), key(copy, dummy_weights=1)
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    assert (key(copy, weightless=True), key(copy, dummy_weights=1)) == before


def test_the_index_of_shards_is(copy):
    before = key(copy)
    index = copy / "model.safetensors.index.json"
    index.write_text(index.read_text() + "\n")
    assert key(copy) != before


def test_the_target_is(tiny):
    assert key(tiny, dataclasses.replace(TARGET, l2_bytes=TARGET.l2_bytes * 2)) != key(tiny)


def test_paths_and_variables_are_not(copy, tiny, tmp_path, monkeypatch):
    (copy / "README.md").write_text("no part of a model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANYTHING", "else")
    assert key(Path("model")) == key(copy) == key(tiny)
    assert key(copy, dump=tmp_path) == key(copy)


def test_nothing_there(tiny, tmp_path):
    assert find_unchanged(tiny, TARGET, tmp_path / "absent", CompileOptions(), Cache(tmp_path / "cache")) is None
    assert list(tmp_path.iterdir()) == []
