"""A file that appears whole or not at all.  Imports neither TVM nor torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text beside `path`, where it takes the place of what was there, and its mode, once it is whole.

    What is no regular file (a pipe, a terminal) is written to.

    Raises:
        OSError: it cannot be written; what was there stays as it was.
    """
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    final = path.resolve()  # a link stays a link
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
        if final.exists():
            shutil.copymode(final, partial)
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
