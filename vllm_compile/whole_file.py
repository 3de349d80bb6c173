"""A file that appears whole or not at all.  Imports neither TVM nor torch."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text beside `path`, where it takes the place of what was there once it is whole.

    Raises:
        OSError: it cannot be written; what was there stays as it was.
    """
    final = path.resolve()  # a link stays a link
    partial = final.with_name(f".{final.name}.partial")
    try:
        partial.write_text(text)
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
