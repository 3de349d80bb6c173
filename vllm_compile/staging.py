"""A directory that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ArtifactError
from .runtime.manifest import MANIFEST


@contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Yield an empty directory beside `final` that takes its place when the block succeeds.

    If the block fails, the new directory is removed and the old one stays as it was.  What an
    earlier, killed run left behind is cleaned up first.

    Raises:
        ArtifactError: `final` exists and is no artifact, or the disk is full.
    """
    final = final.resolve()  # `.` has a name, and a link stays a link
    partial, old = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():  # killed between the two renames below
        old.rename(final)
    if final.exists() and not (final / MANIFEST).exists() and (not final.is_dir() or any(final.iterdir())):
        raise ArtifactError(f"{final}: exists and is no compiled artifact; name another --out or remove it")
    for stale in (partial, old):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        _sync(partial)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise ArtifactError(f"{final}: cannot be written ({error.strerror})") from error
    except RuntimeError as error:  # what TVM makes of a linker that could not write
        full = os.strerror(errno.ENOSPC)
        if full not in str(error):
            raise
        raise ArtifactError(f"{final}: cannot be written ({full})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Have the files on disk before the rename makes them visible."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
