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


def pair_of(text: str) -> tuple[int, int]:
    """`16x1024`: two such numbers; ArgumentTypeError for anything else."""
    first, _, second = text.partition("x")
    return positive(first), positive(second)


def pairs_of(text: str) -> list[tuple[int, int]]:
    """`63x128+1x30000`: such pairs; ArgumentTypeError for anything else."""
    return [pair_of(part) for part in text.split("+")]
