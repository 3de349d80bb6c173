"""The command line of the cache of compiles: `vllm-compile cache list | prune | clear | path`; see docs/cache.md."""

from __future__ import annotations

import argparse
import json
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .cache import LIMIT_BYTES, Cache, Entry, default_directory

console = Console(stderr=True)
SHORT = 12  # characters of a key that people see
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add `--cache` and `--no-cache`; see `cache_of`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--cache", type=Path, metavar="DIR", help="kernels are kept there (default: the user's cache)")
    group.add_argument("--no-cache", action="store_true", help="compile all of it, and keep nothing")


def cache_of(options: argparse.Namespace) -> Cache | None:
    """The cache that `--cache` and `--no-cache` ask for."""
    return None if options.no_cache else Cache(options.cache or default_directory())


def add_cache(commands: Any) -> None:
    """Add `cache` and its commands."""
    parser = commands.add_parser("cache", help="what earlier compiles left for later ones")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def add(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=help)
        action.add_argument("--cache", type=Path, metavar="DIR", help="default: the user's cache directory")
        action.add_argument("--json", action="store_true", help="the answer as the last line of stdout")
        action.set_defaults(run=run, no_cache=False)
        return action

    add("list", _list, "what is in it, the most recently used first")
    prune = add("prune", _prune, "remove what is least recently used")
    prune.add_argument(
        "--max-size", type=bytes_of, default=LIMIT_BYTES, metavar="500M", help="to keep at most (default: 1 GiB)"
    )
    add("clear", _clear, "remove all of it")
    add("path", _path, "where it is")


def bytes_of(text: str) -> int:
    """`0`, `20k`, `500M` or `2G` in bytes; ArgumentTypeError for anything else."""
    found = re.fullmatch(r"(\d+)([kMG]?)B?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500M or 2G")
    return int(found[1]) * UNITS[found[2]]


def _list(options: argparse.Namespace) -> int:
    entries = _cache(options).entries()
    table = Table("kind", "key", "size", "last used", "what")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        table.add_row(entry.kind, entry.key[:SHORT], decimal(entry.size), used, entry.about)
    console.print(table)
    console.print(f"{len(entries)} entries, {decimal(sum(entry.size for entry in entries))}", highlight=False)
    return _answer(options, [asdict(entry) for entry in entries])


def _prune(options: argparse.Namespace) -> int:
    return _removed(options, _cache(options).prune(options.max_size))


def _clear(options: argparse.Namespace) -> int:
    return _removed(options, _cache(options).prune(0))


def _removed(options: argparse.Namespace, entries: list[Entry]) -> int:
    size = sum(entry.size for entry in entries)
    console.print(f"removed {len(entries)} entries, {decimal(size)}", highlight=False)
    return _answer(options, {"removed": len(entries), "bytes": size})


def _path(options: argparse.Namespace) -> int:
    directory = _cache(options).directory
    if not options.json:
        print(directory)
    return _answer(options, {"path": str(directory)})


def _cache(options: argparse.Namespace) -> Cache:
    return Cache(options.cache or default_directory())


def _answer(options: argparse.Namespace, value: Any) -> int:
    if options.json:
        print(json.dumps(value))
    return 0
