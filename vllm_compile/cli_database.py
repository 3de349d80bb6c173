"""The command line of the tuning database: `vllm-compile db ... | worker`; see docs/tuning-database.md."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .canonical import sha256
from .errors import DatabaseError

if TYPE_CHECKING:
    from .schedules.database import Database, Record, State

console = Console(stderr=True)
SHORT = 12  # characters of an id that people see
MOST_SHOWN = 40  # of a configuration's value


def add_database(commands: Any) -> None:
    """Add `db` and its commands."""
    parser = commands.add_parser("db", help="the tuning database that a team shares")
    parser.add_argument("--db", required=True, metavar="URL", help="a file, or postgresql://USER:PASSWORD@HOST/NAME")
    parser.add_argument("--json", action="store_true", help="the answer as the last line of stdout")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def add(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        action = actions.add_parser(name, help=help)
        # Also after the action; SUPPRESS leaves what stands before it alone.
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        action.set_defaults(run=run)
        return action

    listing = add("list", _list, "records by workload and machine, measured before estimated, the fastest first")
    listing.add_argument("--op", help="of this operator only")
    listing.add_argument("--state", choices=("candidate", "verified", "promoted", "retired"))
    listing.add_argument("--limit", type=int, default=50, help="rows at most (default: 50)")
    add("show", _show, "all that is known of a record").add_argument("record", help="its id, or how it starts")
    add("explain", _explain, "which record each kernel of an artifact came from").add_argument("artifact", type=Path)
    add("stats", _stats, "how many records, of what, and the state of the queue")
    export = add("export", _export, "all records to a file")
    export.add_argument("bundle", type=Path, help="a new file; compressed if its name ends in .gz")
    export.add_argument("--salvage", action="store_true", help="leave out what is damaged")
    add("import", _import, "merge a bundle").add_argument("bundle", type=Path)
    add("promote", _promote, "prefer a verified schedule to faster ones").add_argument("record")
    add("retire", _retire, "never use a schedule again").add_argument("record")
    add("migrate", _migrate, "bring the tables to this version's schema")
    add("roles", _roles, "make PostgreSQL's roles for readers and writers")
    token = add("token", _token, "who may write")
    token.add_argument("what", choices=("create", "list", "revoke"))
    token.add_argument("which", nargs="?", help="a team's name, or a token's number")


@contextmanager
def opened(options: argparse.Namespace, writable: bool, salvage: bool = False) -> Iterator[Database]:
    """The database that `--db` names; DatabaseError if it cannot be opened so."""
    try:
        from .schedules.database import open_database
        from .schedules.database.authorise import VARIABLE
    except ModuleNotFoundError as error:
        raise DatabaseError(f"the tuning database needs {error.name}; pip install 'vllm-compile[tune]'") from error
    with open_database(options.db, writable, os.environ.get(VARIABLE), salvage) as database:
        yield database


def _answer(options: argparse.Namespace, value: Any) -> int:
    if options.json:
        print(json.dumps(value))
    return 0


def _summary(record: Record, state: State) -> dict[str, Any]:
    return {"id": record.id, "state": state, "workload": json.loads(record.workload.text)} | {
        "target": dataclasses.asdict(record.target),
        **record.content(),
    }


def _list(options: argparse.Namespace) -> int:
    from .schedules.database.record import How
    from .schedules.database.store import select_where

    def order(item: tuple[Record, State]) -> tuple[str, str, bool, float]:
        record, _ = item
        return record.workload.text, record.target.key, record.how != How.MEASURED, record.times.median

    with opened(options, writable=False) as database:
        found = [
            (record, state)
            for record, state in select_where(database, options.state)
            if options.op is None or json.loads(record.workload.text).get("op") == options.op
        ]
    found.sort(key=order)
    shown = found[: options.limit]
    table = Table("id", "state", "workload", "device", "µs", "GB/s", "roofline", "how", "by", "host")
    for record, state in shown:
        rates = [f"{record.times.median:.1f}", f"{record.gb_per_s:.0f}", f"{record.roofline_share:.0%}", record.how]
        who = [record.provenance.author, record.provenance.host]
        table.add_row(record.id[:SHORT], state, record.workload.summary(), record.target.device, *rates, *who)
    console.print(table)
    console.print(f"{len(shown)} of {len(found)} records")
    return _answer(options, [_summary(*item) for item in shown])


def _show(options: argparse.Namespace) -> int:
    from .schedules.database.store import find

    with opened(options, writable=False) as database:
        summary = _summary(*find(database, options.record))
    console.print_json(json.dumps(summary))
    return _answer(options, summary)


def _explain(options: argparse.Namespace) -> int:
    from .runtime.manifest import read_manifest
    from .schedules.database.store import find

    kernels = read_manifest(options.artifact)["kernels"]
    answers = []
    with opened(options, writable=False) as database:
        for kernel in kernels:
            answer = {name: kernel[name] for name in ("symbol", "op", "min_tokens", "family", "config")}
            said = f"{kernel['family']} by its own rules, not from a database"
            for name in ("record", "passed_over"):
                source = kernel.get(name)
                answer[name] = None
                if source is not None:
                    record, state = find(database, source["id"])
                    answer[name] = {**source, **_summary(record, state)}
                    said = _sentence(record, state, source) if name == "record" else said + _passed_over(record, source)
            answers.append(answer)
            console.print(f"{kernel['symbol']}: {said}", soft_wrap=True, highlight=False)
    return _answer(options, answers)


def _sentence(record: Record, state: State, source: Mapping[str, Any]) -> str:
    """What `explain` says of one kernel."""
    schedule = record.schedule.content()
    config = " ".join(f"{name}={_short(value)}" for name, value in sorted(schedule["config"].items()))
    stale = f"; stale: {', '.join(source['changed'])} changed since" if source["changed"] else ""
    return (
        f"runs {schedule['family']} {config}, {_origin(record)}, "
        f"{record.gb_per_s:.0f} GB/s, {record.roofline_share:.0%} of roofline; record {record.id[:SHORT]}, {state}, "
        f"match {source['match']}{stale}"
    )


def _passed_over(record: Record, source: Mapping[str, Any]) -> str:
    """What `explain` adds where a record was preferred, but of no use."""
    kind = f"{record.schedule.content().get('family', 'a module')} by {record.schedule.kind}"
    return f"; passed over: {kind}, {_origin(record)}, record {record.id[:SHORT]}: {source['reason']}"


def _origin(record: Record) -> str:
    """Where its time was measured, or for which machine estimated, by whom, and the time."""
    from .schedules.database.record import How

    provenance = record.provenance
    day = time.strftime("%Y-%m-%d", time.gmtime(provenance.measured_at))
    where = "for" if record.how == How.ESTIMATED else "on"
    return (
        f"{record.how} {where} {record.target.device} ({provenance.host}) by {provenance.author} on {day} at "
        f"{provenance.commit[:SHORT]}: {record.times.median:.1f} µs"
    )


def _short(value: Any) -> str:
    """A value of a configuration; of a trace, which is long, the digest."""
    text = str(value)
    return text if len(text) <= MOST_SHOWN else sha256(text)[:SHORT]


def _stats(options: argparse.Namespace) -> int:
    from .schedules.database.record import How
    from .schedules.database.store import count
    from .schedules.database.tasks import counts, waiting_for

    with opened(options, writable=False) as database:
        answer = {"records": count(database), "estimates": count(database, How.ESTIMATED), "tasks": counts(database)}
        answer["queued_for"] = waiting_for(database)
    for state, number in answer["records"].items():
        console.print(f"records, {state}: {number}")
    console.print(f"estimates: {sum(answer['estimates'].values())}")
    for state, number in answer["tasks"].items():
        console.print(f"tasks, {state}: {number}")
    for machine, number in answer["queued_for"].items():
        console.print(f"tasks, queued for {machine}: {number}", soft_wrap=True, highlight=False)
    return _answer(options, answer)


def _export(options: argparse.Namespace) -> int:
    from .schedules.database.bundle import export_bundle

    with opened(options, writable=False, salvage=options.salvage) as database:
        written, damaged = export_bundle(database, options.bundle, options.salvage)
    console.print(f"wrote {written} records to {options.bundle}; {damaged} damaged ones left out", soft_wrap=True)
    return _answer(options, {"records": written, "damaged": damaged})


def _import(options: argparse.Namespace) -> int:
    from .schedules.database.bundle import import_bundle

    with opened(options, writable=True) as database:
        read, new = import_bundle(database, options.bundle)
    console.print(f"{read} records in {options.bundle}, {new} of them new", soft_wrap=True)
    return _answer(options, {"records": read, "new": new})


def _promote(options: argparse.Namespace) -> int:
    from .schedules.database.store import promote

    with opened(options, writable=True) as database:
        record = promote(database, options.record)
    console.print(f"record {record[:SHORT]} and all of its schedule are promoted")
    return _answer(options, {"id": record, "state": "promoted"})


def _retire(options: argparse.Namespace) -> int:
    from .schedules.database.store import retire

    with opened(options, writable=True) as database:
        record = retire(database, options.record)
    console.print(f"record {record[:SHORT]} and all of its schedule are retired")
    return _answer(options, {"id": record, "state": "retired"})


def _migrate(options: argparse.Namespace) -> int:
    from .schedules.database.home import migrate_database

    schema = migrate_database(options.db)
    console.print(f"the schema is {schema}")
    return _answer(options, {"schema": schema})


def _roles(options: argparse.Namespace) -> int:
    from .schedules.database.roles import create_roles

    with opened(options, writable=True) as database:
        roles = create_roles(database)
    console.print(f"roles {', '.join(roles)}; give them to accounts: GRANT {roles[0]} TO builder")
    return _answer(options, {"roles": roles})


def _token(options: argparse.Namespace) -> int:
    from .schedules.database import tokens
    from .schedules.database.authorise import VARIABLE

    if (options.which is None) != (options.what == "list"):
        raise DatabaseError("token create TEAM, token list, or token revoke NUMBER")
    with opened(options, writable=options.what != "list") as database:
        if options.what == "create":
            token = tokens.create(database, options.which)
            console.print("shown this once; set it as " + VARIABLE)
            print(token)
            return _answer(options, {"team": options.which, "token": token})
        if options.what == "revoke":
            if not options.which.isdecimal():
                raise DatabaseError(f"a token is revoked by its number, not {options.which!r}; see: db token list")
            tokens.revoke(database, int(options.which))
            console.print(f"token {options.which} is revoked")
        known = tokens.all_tokens(database)
    table = Table("number", "team", "made", "revoked")
    for token_of in known:
        table.add_row(str(token_of.id), token_of.team, _day(token_of.created_at), _day(token_of.revoked_at))
    console.print(table)
    return _answer(options, [dataclasses.asdict(token_of) for token_of in known])


def _day(seconds: float | None) -> str:
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))
