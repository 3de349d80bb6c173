"""A content-addressed cache in a directory: what a compile made, under the SHA-256 of what it was made from.

An entry is one file, `KIND/KEY`: a line with the SHA-256 of the rest, a line for people, the content.  It is written
beside and renamed, so that any number of processes may use a directory at once without a lock: an entry is whole
whoever wrote it last, and who reads one that is being removed has missed it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .canonical import canonical, sha256

LIMIT_BYTES = 1 << 30
PARTIAL = ".partial-"
STALE_SECONDS = 3600  # after which a partial file is a killed process's


def default_directory() -> Path:
    """`vllm-compile` in the user's cache directory, by the XDG Base Directory Specification."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "vllm-compile"


def key_of(facts: Any) -> str:
    """The key of what is made from these facts: SHA-256 of their canonical JSON."""
    return sha256(canonical(facts))


@dataclass(frozen=True)
class Entry:
    """One entry.

    Attributes:
        size: of its file, in bytes.
        used: seconds since the epoch when it was last read or written.
        about: what it is, for people.
    """

    kind: str
    key: str
    size: int
    used: float
    about: str


@dataclass
class Cache:
    """The cache in `directory`, which is made when something is first put into it.

    Attributes:
        limit_bytes: what is least recently used goes when all entries together are larger.
        problems: what the user should know: entries that were damaged, or could not be written.
    """

    directory: Path
    limit_bytes: int = LIMIT_BYTES
    problems: list[str] = field(default_factory=list)

    def get(self, kind: str, key: str) -> bytes | None:
        """The content of an entry, or None if there is none; one that is damaged is removed and noted in `problems`."""
        path = self._path(kind, key)
        try:
            digest, _, rest = path.read_bytes().partition(b"\n")
            if hashlib.sha256(rest).hexdigest().encode() != digest:
                path.unlink(missing_ok=True)
                self.problems.append(f"{path}: damaged (SHA-256); it is made again")
                return None
            with suppress(OSError):  # it may be another's, or on a disk that is only read
                os.utime(path)  # last used now; many file systems do not keep the time of reads
        except FileNotFoundError:
            return None
        except OSError as error:
            self.problems.append(f"{path}: cannot be read ({error.strerror})")
            return None
        return rest.partition(b"\n")[2]

    def put(self, kind: str, key: str, about: str, content: bytes) -> None:
        """Add an entry; where that fails (a full disk, no permission) it is noted in `problems` and left out."""
        path = self._path(kind, key)
        rest = about.encode() + b"\n" + content
        partial = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(prefix=PARTIAL, dir=path.parent, delete=False) as file:
                partial = Path(file.name)
                file.write(hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)
            partial.replace(path)
        except OSError as error:
            self.problems.append(f"{path}: cannot be written ({error.strerror})")
            if partial is not None:
                partial.unlink(missing_ok=True)

    def entries(self) -> list[Entry]:
        """All entries, the most recently used first."""
        found = []
        for path in self._files():
            try:
                with path.open("rb") as file:
                    file.readline()
                    about = file.readline().decode(errors="replace").rstrip("\n")
                status = path.stat()
            except FileNotFoundError:  # another process prunes
                continue
            found.append(Entry(path.parent.name, path.name, status.st_size, status.st_mtime, about))
        return sorted(found, key=lambda entry: -entry.used)

    def prune(self, limit_bytes: int | None = None) -> list[Entry]:
        """Remove what is least recently used until all is no larger than the limit; returns what was removed."""
        limit = self.limit_bytes if limit_bytes is None else limit_bytes
        for path in self.directory.glob(f"*/{PARTIAL}*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
        kept, removed = 0, []
        for entry in self.entries():
            kept += entry.size
            if kept > limit:
                self._path(entry.kind, entry.key).unlink(missing_ok=True)
                removed.append(entry)
        return removed

    def _path(self, kind: str, key: str) -> Path:
        return self.directory / kind / key

    def _files(self) -> Iterator[Path]:
        return (path for path in self.directory.glob("*/*") if not path.name.startswith(PARTIAL))


def user_cache() -> Cache | None:
    """The cache in the user's directory; None for a user without one."""
    try:
        return Cache(default_directory())
    except RuntimeError:  # no HOME, and an id that no name belongs to
        return None
