"""Digests are remembered as long as nothing of a file can have changed."""

from __future__ import annotations

import os
import shutil
import time
from hashlib import sha256

import pytest

from vllm_compile import file_digests
from vllm_compile.cache import Cache
from vllm_compile.file_digests import FileDigests


@pytest.fixture
def reads(monkeypatch):
    """The files that were read."""
    paths, read = [], file_digests.sha256

    def spy(path):
        paths.append(path)
        return read(path)

    monkeypatch.setattr(file_digests, "sha256", spy)
    return paths


@pytest.fixture
def digests(tmp_path) -> FileDigests:
    return FileDigests(Cache(tmp_path / "cache"))


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A file that was not changed of late, as two seconds are called for a test's sake."""
    path = tmp_path / "weights"
    path.write_bytes(b"first")
    monkeypatch.setattr(file_digests, "GRANULARITY_NS", 10**7)
    time.sleep(0.1)
    return path


def digest_of(content: bytes) -> str:
    return sha256(content).hexdigest()


def test_read_once(digests, settled, reads):
    assert [digests.sha256(settled) for _ in range(3)] == [digest_of(b"first")] * 3
    assert reads == [settled]
    again = FileDigests(Cache(digests.cache.directory))
    assert again.sha256(settled) == digest_of(b"first")
    assert reads == [settled], "another process knows it too"


def test_under_any_name(digests, settled, reads, tmp_path):
    digests.sha256(settled)
    (tmp_path / "link").symlink_to(settled)
    (tmp_path / "folder").mkdir()
    assert digests.sha256(tmp_path / "link") == digests.sha256(tmp_path / "folder" / ".." / "weights")
    assert len(reads) == 1


def test_without_a_cache(settled, reads):
    assert [FileDigests().sha256(settled) for _ in range(2)] == [digest_of(b"first")] * 2
    assert len(reads) == 2


def test_what_has_just_changed_is_not_remembered(digests, tmp_path, reads, monkeypatch):
    """However long the test is held up."""
    monkeypatch.setattr(file_digests, "GRANULARITY_NS", 10**13)
    path = tmp_path / "new"
    path.write_bytes(b"first")
    assert [digests.sha256(path) for _ in range(2)] == [digest_of(b"first")] * 2
    assert len(reads) == 2


def _rewrite(path):
    """As long as before, and its time set back."""
    status = path.stat()
    path.write_bytes(b"other")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replace(path):
    """By another file, with all its times."""
    other = path.with_name("other")
    other.write_bytes(b"other")
    shutil.copystat(path, other)
    other.replace(path)


def _append(path):
    path.write_bytes(b"first and more")


@pytest.mark.parametrize("change", [_rewrite, _replace, _append])
def test_changes_are_seen(digests, settled, change):
    assert digests.sha256(settled) == digest_of(b"first")
    change(settled)
    assert digests.sha256(settled) == digest_of(settled.read_bytes()) != digest_of(b"first")


def test_a_file_that_changes_while_it_is_read(digests, settled, monkeypatch, reads):
    read = file_digests.sha256

    def slow(path):
        found = read(path)
        _rewrite(path)
        return found

    monkeypatch.setattr(file_digests, "sha256", slow)
    digests.sha256(settled)
    monkeypatch.setattr(file_digests, "sha256", read)
    assert digests.sha256(settled) == digest_of(b"other")
