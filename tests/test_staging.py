"""A directory that appears whole or not at all."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_compile.errors import ArtifactError
from vllm_compile.runtime.manifest import MANIFEST
from vllm_compile.staging import staged


def write(directory: Path, text: str) -> None:
    (directory / "payload").write_text(text)
    (directory / MANIFEST).write_text("{}")


@pytest.fixture
def final(tmp_path: Path) -> Path:
    """An artifact that is already there."""
    final = tmp_path / "artifact"
    with staged(final) as directory:
        write(directory, "old")
    return final


def assert_only(final: Path, text: str) -> None:
    """The artifact holds `text`, and nothing else is beside it."""
    assert (final / "payload").read_text() == text
    assert [path.name for path in final.parent.iterdir()] == [final.name]


def test_success_replaces(final):
    with staged(final) as directory:
        write(directory, "new")
        assert (final / "payload").read_text() == "old"
    assert_only(final, "new")


def test_parents_are_made(tmp_path):
    final = tmp_path / "a" / "b"
    with staged(final) as directory:
        write(directory, "new")
    assert_only(final, "new")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old_one(final, error):
    def fail(directory):
        write(directory, "new")
        raise error

    with pytest.raises(error), staged(final) as directory:
        fail(directory)
    assert_only(final, "old")


@pytest.mark.parametrize("make", [lambda p: p.write_text(""), lambda p: (p / "thesis").mkdir(parents=True)])
def test_what_is_no_artifact_is_not_overwritten(tmp_path, make):
    final = tmp_path / "precious"
    make(final)
    with pytest.raises(ArtifactError, match="is no compiled artifact"), staged(final):
        pytest.fail("it must not come to this")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_empty_directory_is_used(tmp_path):
    final = tmp_path / "artifact"
    final.mkdir()
    with staged(final) as directory:
        write(directory, "new")
    assert_only(final, "new")


KILLED = """
import sys, time
from pathlib import Path
from vllm_compile.staging import staged
with staged(Path(sys.argv[1])) as directory:
    (directory / "payload").write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_killed_in_the_middle(final):
    process = subprocess.Popen([sys.executable, "-c", KILLED, final], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (final / "payload").read_text() == "old"
    assert len(list(final.parent.iterdir())) == 2, "what the killed run had written"
    with staged(final) as directory:
        write(directory, "new")
    assert_only(final, "new")


def test_killed_between_the_renames(final, monkeypatch):
    rename = Path.rename

    def killed_at_the_second(self, target):
        if self.name.endswith(".partial"):
            raise SystemExit
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_at_the_second)
        with pytest.raises(SystemExit), staged(final) as directory:
            write(directory, "new")
    assert not final.exists()
    with pytest.raises(ValueError, match="again"), staged(final):
        raise ValueError("again")
    assert_only(final, "old")


def disk_is_full(_: Path) -> None:
    """Opening /dev/full works, writing to it is writing to a full disk."""
    Path("/dev/full").write_text("new")


def linker_failed(_: Path) -> None:
    """What TVM raises when the linker finds the disk full."""
    raise RuntimeError("Compilation error:\n/usr/bin/ld: final link failed: No space left on device")


@pytest.mark.parametrize("write_all", [disk_is_full, linker_failed])
def test_full_disk(final, write_all):
    expected = pytest.raises(ArtifactError, match=r"artifact: cannot be written .No space left")
    with expected as caught, staged(final) as directory:
        write(directory, "new")
        write_all(directory)
    assert "\n" not in str(caught.value)
    assert_only(final, "old")


def test_other_errors_keep_their_kind(final):
    with pytest.raises(OSError, match="Too many open files"), staged(final):
        raise OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(RuntimeError, match="ours"), staged(final):
        raise RuntimeError("a defect of ours")
    assert_only(final, "old")
