"""Values of options that several commands have."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number from 1 on; ArgumentTypeError for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def positives(text: str) -> list[int]:
    """`1,8,16`: such numbers, each once; ArgumentTypeError for anything else."""
    return list(dict.fromkeys(map(positive, text.split(","))))
