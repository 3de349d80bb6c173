"""The cache's directory: what goes in comes out whole or not at all, however many use it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_compile.cache import PARTIAL, STALE_SECONDS, Cache, default_directory, key_of
from vllm_compile.cli import main
from vllm_compile.cli_cache import bytes_of

KEY = key_of("something")
CONTENT = bytes(range(256)) + b"\n\n"


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache")


def only_file(cache: Cache) -> Path:
    (path,) = [path for path in cache.directory.rglob("*") if path.is_file()]
    return path


def test_what_goes_in_comes_out(cache):
    assert cache.get("kernels", KEY) is None
    assert not cache.directory.exists(), "made when there is something to put into it"
    cache.put("kernels", KEY, "an entry", CONTENT)
    assert cache.get("kernels", KEY) == CONTENT
    assert cache.get("digests", KEY) is None
    assert cache.get("kernels", key_of("else")) is None
    assert cache.problems == []
    (entry,) = cache.entries()
    assert (entry.kind, entry.key, entry.about) == ("kernels", KEY, "an entry")
    assert entry.size == only_file(cache).stat().st_size


def test_keys_are_of_values():
    assert key_of({"a": 1, "b": [2.5, None]}) == key_of({"b": [2.5, None], "a": 1})
    assert key_of({"a": 1}) == hashlib.sha256(b'{"a":1}').hexdigest()
    assert len({key_of(value) for value in ({"a": 1}, {"a": "1"}, {"a": 2}, {"b": 1}, {"a": [1]})}) == 5


@pytest.mark.parametrize("at", [0, 70, -1], ids=["digest", "about", "content"])
def test_damage_is_noticed(cache, at):
    cache.put("kernels", KEY, "an entry", CONTENT)
    damaged = bytearray(only_file(cache).read_bytes())
    damaged[at] ^= 1
    only_file(cache).write_bytes(damaged)
    assert cache.get("kernels", KEY) is None
    (problem,) = cache.problems
    assert "damaged" in problem
    assert KEY in problem
    assert cache.entries() == [], "it will not be read again"


@pytest.mark.parametrize("length", [0, 10, 65, 100])
def test_half_an_entry_is_none(cache, length):
    cache.put("kernels", KEY, "an entry", CONTENT)
    os.truncate(only_file(cache), length)
    assert cache.get("kernels", KEY) is None
    assert len(cache.problems) == 1


def test_where_nothing_can_be_written(cache):
    cache.directory.write_text("a file where the directory would be")
    cache.put("kernels", KEY, "an entry", CONTENT)
    assert "cannot be written" in cache.problems[0]
    assert cache.get("kernels", KEY) is None
    assert cache.entries() == cache.prune() == []


def test_least_recently_used_goes_first(cache):
    for name in ("a", "b", "c"):
        cache.put("kernels", key_of(name), name, bytes(1000))
    for age, name in ((300, "a"), (200, "b"), (100, "c")):
        os.utime(cache.directory / "kernels" / key_of(name), (time.time() - age,) * 2)
    assert cache.prune() == []
    cache.get("kernels", key_of("a"))
    assert [entry.about for entry in cache.prune(2500)] == ["b"]
    assert [entry.about for entry in cache.entries()] == ["a", "c"]
    assert {entry.about for entry in cache.prune(0)} == {"a", "c"}
    assert cache.entries() == []


def test_what_killed_processes_left(cache):
    cache.put("kernels", KEY, "an entry", CONTENT)
    old, young = (cache.directory / "kernels" / f"{PARTIAL}{name}" for name in ("old", "young"))
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (time.time() - 2 * STALE_SECONDS,) * 2)
    assert len(cache.entries()) == 1
    cache.prune()
    assert not old.exists()
    assert young.exists(), "another process may be writing it"


HAMMER = """
import random, sys
from pathlib import Path
from vllm_compile.cache import Cache, key_of
cache, found = Cache(Path(sys.argv[1])), 0
for _ in range(300):
    number = random.randrange(8)
    content = bytes([number]) * (20_000 + number)
    known = cache.get("kernels", key_of(number))
    assert known in (None, content), "half an entry, or another"
    found += known is not None
    if known is None:
        cache.put("kernels", key_of(number), str(number), content)
    if random.random() < 0.1:
        cache.prune(random.choice([0, 70_000]))
assert cache.problems == [], cache.problems
print(found)
"""


def test_many_processes_at_once(cache):
    processes = [
        subprocess.Popen([sys.executable, "-c", HAMMER, cache.directory], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    found = [int(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert min(found) > 0, "they read, too"
    assert not list(cache.directory.rglob(f"{PARTIAL}*"))


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in (
        (str(tmp_path / "x"), tmp_path / "x" / "vllm-compile"),
        ("relative", tmp_path / ".cache" / "vllm-compile"),
        ("", tmp_path / ".cache" / "vllm-compile"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_directory() == expected


def test_sizes():
    assert [bytes_of(text) for text in ("0", "20k", "500M", "2GB")] == [0, 20_000, 500_000_000, 2_000_000_000]
    with pytest.raises(Exception, match="is no size"):
        bytes_of("much")


def test_command_line(cache, capsys):
    for name in ("a", "b"):
        cache.put("kernels", key_of(name), f"entry {name}", CONTENT)

    def answer(*arguments: str):
        assert main(["cache", *arguments, "--cache", str(cache.directory), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    listed = answer("list")
    assert {entry["about"] for entry in listed} == {"entry a", "entry b"}
    assert answer("path") == {"path": str(cache.directory)}
    assert answer("prune") == {"removed": 0, "bytes": 0}
    assert answer("prune", "--max-size", str(listed[0]["size"]))["removed"] == 1
    assert answer("clear") == {"removed": 1, "bytes": listed[0]["size"]}
    assert answer("list") == []
