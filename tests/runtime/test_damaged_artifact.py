"""Artifacts that are not as they were compiled are refused, and say what is wrong."""

import json
import shutil
from pathlib import Path

import pytest

from vllm_compile import file_digests
from vllm_compile.errors import ArtifactError
from vllm_compile.runtime.manifest import SCHEMA, content_digest, sha256
from vllm_compile.runtime.program import load

FILES = ("config.json", "plan.json", "kernels.so", "model-00001.safetensors", "tokenizer.json")


@pytest.fixture
def copy(tiny_fp32, tmp_path) -> Path:
    """An artifact that a test may damage."""
    return Path(shutil.copytree(tiny_fp32, tmp_path / "artifact"))


def change_manifest(directory: Path, **fields) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(manifest | {"digest": content_digest(manifest)}))


@pytest.mark.parametrize("name", FILES)
def test_one_byte(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} differs from what was compiled \(SHA-256\)"):
        load(copy)


def test_weights_are_read_once_as_long_as_they_are_the_same(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "GRANULARITY_NS", 0)
    read = []
    monkeypatch.setattr(file_digests, "sha256", lambda path: read.append(path.name) or sha256(path))
    weights = [name for name in FILES if name.endswith(".safetensors")]
    for _ in range(2):
        load(copy)
        assert sorted(read) == sorted(weights)
    content = (copy / weights[0]).read_bytes()
    (copy / weights[0]).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=rf"{weights[0]} differs from what was compiled \(SHA-256\)"):
        load(copy)


@pytest.mark.parametrize("name", FILES)
def test_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        load(copy)


def test_no_manifest(copy):
    (copy / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="no compiled artifact here"):
        load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", f'{{"schema": {SCHEMA}}}'], ids=repr)
def test_not_a_manifest(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="not a manifest"):
        load(copy)


@pytest.mark.parametrize(("schema", "advice"), [(99, "update vllm-compile"), (1, "compile the model again")])
def test_another_schema(copy, schema, advice):
    change_manifest(copy, schema=schema)
    with pytest.raises(ArtifactError, match=f"artifact schema {schema}.*{advice}"):
        load(copy)


def test_another_processor(copy):
    change_manifest(copy, target={"name": "cpu", "features": ["avx2", "avx1024_fp3"]})
    with pytest.raises(ArtifactError, match=r"compiled for a CPU with avx1024_fp3, which this machine lacks"):
        load(copy)


def test_not_a_plan(copy):
    """One that its manifest knows."""
    (copy / "plan.json").write_text("{}")
    digests = json.loads((copy / "manifest.json").read_text())["files"]
    change_manifest(copy, files=digests | {"plan.json": sha256(copy / "plan.json")})
    with pytest.raises(ArtifactError, match=r"plan.json: not a plan"):
        load(copy)


def test_manifest_changed_by_hand(copy):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["verdict"]["outcome"] = "unknown"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"manifest.json differs from what was compiled"):
        load(copy)


def test_no_pickle(tiny_fp32):
    """Known kinds of files only, and none begins as a pickle or an archive of pickles does."""
    for path in tiny_fp32.iterdir():
        assert path.suffix in (".json", ".so", ".safetensors"), path.name
        assert not path.read_bytes().startswith((b"\x80", b"PK"))
