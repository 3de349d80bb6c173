"""Bundles: a database's records in one checksummed file, for teams without a network between them.

A bundle is text, one JSON value a line (gzip-compressed where its name ends in .gz):

    {"bundle": 2}                                       format
    {"workload": TEXT}                                  numbered 0, 1, ... as they come
    {"target": TEXT}                                    likewise
    {"record": {...}, "workload": 0, "target": 0, "state": "verified"}
    {"records": 1, "sha256": "..."}                     how many, and the digest of all bytes before this line

Records are named by what they say and states only ever rise, so that importing is a union: nothing is lost, and it
does not matter in which order, or how often, bundles are imported.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from sqlalchemy import func, select

from vllm_compile.canonical import canonical
from vllm_compile.errors import DatabaseError

from .fingerprint import Fingerprint
from .home import Database
from .record import Record, State
from .rows import record_of, select_records
from .schema import records
from .store import insert
from .workload import Workload

FORMAT = 2  # a record's verdict may be null
FORMATS = (1, FORMAT)  # that are read
BATCH = 10_000  # records of one transaction


def export_bundle(database: Database, path: Path, salvage: bool = False) -> tuple[int, int]:
    """Write all records to a new file; gives how many, and how many were damaged.

    With `salvage` damaged records are left out; without it, the first is an error.

    Raises:
        DatabaseError: a record is damaged, the file exists, or it cannot be written.
    """
    damaged = 0

    def sound() -> Iterator[tuple[Record, State]]:
        nonlocal damaged
        for item in all_records(database, salvage):
            if item is None:
                damaged += 1
            else:
                yield item

    return write_bundle(path, sound()), damaged


def write_bundle(path: Path, items: Iterable[tuple[Record, State]]) -> int:
    """Write a new bundle of these records; gives how many; DatabaseError as above."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    if path.exists():
        raise DatabaseError(f"{path}: exists already; name a new file")
    try:
        with _open(staged, path.suffix, "wb") as file:
            count = _write(file, items)
        os.link(staged, path)  # unlike a rename, never over a file that has appeared since
    except OSError as error:
        raise DatabaseError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        staged.unlink(missing_ok=True)
    return count


def import_bundle(database: Database, path: Path) -> tuple[int, int]:
    """Merge a bundle into the database; gives how many records it has, and how many of them were new.

    Raises:
        DatabaseError: the bundle is torn or altered; nothing of it is imported then.
    """
    for _ in _records(path):  # all of it is sound before any of it is stored
        pass
    count = new = 0
    batch: list[tuple[Record, State]] = []

    def store() -> None:
        nonlocal new
        with database.writing() as connection:
            before = _count(connection)
            insert(connection, batch)
            new += _count(connection) - before
        batch.clear()

    for item in _records(path):
        batch.append(item)
        count += 1
        if len(batch) == BATCH:
            store()
    if batch:
        store()
    return count, new


def all_records(database: Database, salvage: bool = False) -> Iterator[tuple[Record, State] | None]:
    """Every record with its state, by id; None for a damaged one if `salvage` is set, otherwise DatabaseError."""
    with database.reading() as connection:
        if not salvage:
            statement = select_records().order_by(records.c.id)
            for row in connection.execution_options(yield_per=1000).execute(statement):
                yield record_of(row, database.name)
            return
    for key in _readable_keys(database):
        try:
            with database.reading() as connection:
                found = connection.execute(select_records().where(records.c.id == key)).first()
                yield record_of(found, database.name) if found is not None else None
        except DatabaseError:
            yield None


def _readable_keys(database: Database) -> list[str]:
    """Ids of records, from whichever way through the file is not damaged."""
    found: set[str] = set()
    for order in (records.c.id, records.c.id.desc(), records.c.workload_id, records.c.workload_id.desc()):
        try:
            with database.reading() as connection:
                for key in connection.scalars(select(records.c.id).order_by(order)):
                    found.add(key)
        except DatabaseError:
            continue
    return sorted(found)


def _count(connection: Any) -> int:
    return int(connection.scalar(select(func.count()).select_from(records)))


def _open(path: Path, suffix: str, mode: str) -> IO[bytes]:
    if suffix == ".gz":
        return gzip.open(path, mode)  # type: ignore[return-value]
    return path.open(mode)  # type: ignore[return-value]


def _write(file: IO[bytes], items: Iterable[tuple[Record, State]]) -> int:
    digest = hashlib.sha256()
    numbers: dict[str, dict[str, int]] = {"workload": {}, "target": {}}

    def line(value: Any) -> None:
        text = canonical(value).encode() + b"\n"
        digest.update(text)
        file.write(text)

    def number(kind: str, text: str) -> int:
        known = numbers[kind]
        if text not in known:
            line({kind: text})
            known[text] = len(known)
        return known[text]

    line({"bundle": FORMAT})
    count = 0
    for record, state in items:
        workload, target = number("workload", record.workload.text), number("target", record.target.text)
        line({"record": record.content(), "workload": workload, "target": target, "state": state})
        count += 1
    file.write(canonical({"records": count, "sha256": digest.hexdigest()}).encode() + b"\n")
    return count


def _records(path: Path) -> Iterator[tuple[Record, State]]:
    """The records of a bundle; DatabaseError at its end if it is not what was exported."""
    digest, count = hashlib.sha256(), 0
    workloads: list[Workload] = []
    targets: list[Fingerprint] = []
    whole = False
    try:
        with _open(path, path.suffix, "rb") as file:
            header = file.readline()
            digest.update(header)
            version = json.loads(header)["bundle"]
            if version not in FORMATS:
                raise DatabaseError(
                    f"{path}: bundle format {version}, this version reads {FORMAT} at most; update vllm-compile"
                )
            for text in file:
                value = json.loads(text)
                if "sha256" in value:
                    whole = value == {"records": count, "sha256": digest.hexdigest()} and not file.read(1)
                    break
                digest.update(text)
                if "record" in value:
                    workload, target = workloads[value["workload"]], targets[value["target"]]
                    yield Record.from_content(value["record"], workload, target), State(value["state"])
                    count += 1
                elif "workload" in value:
                    workloads.append(Workload.from_text(value["workload"]))
                else:
                    targets.append(Fingerprint.from_text(value["target"]))
    except FileNotFoundError as error:
        raise DatabaseError(f"{path}: no such file") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DatabaseError(f"{path}: not a whole bundle ({error}); copy it again; nothing was imported") from error
    if not whole:
        raise DatabaseError(f"{path}: torn or altered (SHA-256); copy it again; nothing was imported")
