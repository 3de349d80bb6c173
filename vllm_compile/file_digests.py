"""SHA-256 of files, without reading again those that are known not to have changed.

Hashing a checkpoint of 140 GB takes minutes.  Its digest is remembered with what the file system says of the file:
device, inode, size, and the times of the last change of its content (mtime) and of its inode (ctime).  Any write sets
both times; a program can set mtime back, but not ctime; a file put in another's place has another inode.  A time is
only as fine as the file system keeps it, so a file that changed less than two seconds (the coarsest in use, FAT's)
before it was read is not remembered: it might change once more within the same instant, and nobody would see.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from .cache import Cache, key_of
from .runtime.manifest import sha256

KIND = "digests"
GRANULARITY_NS = 2 * 10**9


@dataclass(frozen=True)
class FileDigests:
    """Digests of files, those in `cache` remembered."""

    cache: Cache | None = None

    def sha256(self, path: Path) -> str:
        """Hex digest of a file's bytes."""
        if self.cache is None:
            return sha256(path)
        began, status = time.time_ns(), status_of(path)
        key = key_of(status)
        if (known := self.cache.get(KIND, key)) is not None:
            return known.decode()
        digest = sha256(path)
        if status_of(path) == status and max(status["mtime"], status["ctime"]) < began - GRANULARITY_NS:
            self.cache.put(KIND, key, f"SHA-256 of a file of {status['size']} bytes", digest.encode())
        return digest


def status_of(path: Path) -> dict[str, int]:
    """What changes when a file does; times in nanoseconds since the epoch."""
    status = path.stat()
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "size": status.st_size,
        "mtime": status.st_mtime_ns,
        "ctime": status.st_ctime_ns,
    }
