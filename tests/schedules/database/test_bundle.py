"""Bundles: merging is a union; what is torn is refused."""

from __future__ import annotations

import gzip
import random
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import SEED
from vllm_compile.errors import DatabaseError
from vllm_compile.schedules.database import How, State, commit, open_database
from vllm_compile.schedules.database.bundle import all_records, export_bundle, import_bundle, write_bundle
from vllm_compile.schedules.database.record import STATES
from vllm_compile.schedules.database.store import insert

from .samples import linear, random_records, record

# Few schedules on few hosts, so that databases often have some in common.
POOL = [
    record(linear(N=64 * n), config={"config": c}, host=host)
    for n in (1, 2)
    for c in (1, 2)
    for host in ("alpha", "beta", "gamma")
]
ESTIMATE = record(how=How.ESTIMATED, verdict=None)
MEASURED = len(POOL)  # from here on estimates of some of the same schedules
POOL += [
    record(linear(N=64), config={"config": c}, how=How.ESTIMATED, verdict=None, at=at) for c in (1, 2) for at in (1, 2)
]
CONTENTS = st.dictionaries(st.sampled_from(range(len(POOL))), st.sampled_from(STATES))


def content(database) -> dict[str, State]:
    return {item[0].id: item[1] for item in all_records(database)}


def filled(path: Path, chosen: dict[int, State]) -> dict[str, State]:
    """A database of these records, and a bundle beside it; gives what it holds."""
    with open_database(path) as database:
        with database.writing() as connection:
            insert(connection, [(POOL[number], _possible(number, state)) for number, state in chosen.items()])
        export_bundle(database, path.with_suffix(".bundle"))
        return content(database)


def _possible(number: int, state: State) -> State:
    """An estimate is a candidate, or retired."""
    return state if number < MEASURED or state == State.RETIRED else State.CANDIDATE


def merged(path: Path, *bundles: Path) -> dict[str, State]:
    with open_database(path) as database:
        for bundle in bundles:
            import_bundle(database, bundle)
        return content(database)


@settings(max_examples=20)
@given(CONTENTS, CONTENTS)
def test_merging_is_a_union(first, second):
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder, "a.bundle"), Path(folder, "b.bundle")
        in_a, in_b = filled(a.with_suffix(".db"), first), filled(b.with_suffix(".db"), second)
        both = merged(Path(folder, "ab.db"), a, b)
        assert both == merged(Path(folder, "ba.db"), b, a)  # commutative
        assert both == merged(Path(folder, "aba.db"), a, b, a, b)  # idempotent
        assert both.keys() == in_a.keys() | in_b.keys()  # nothing lost
        rank = STATES.index
        for known in (in_a, in_b):
            assert all(rank(both[key]) >= rank(state) for key, state in known.items())


def test_two_databases_verify_what_neither_could_alone(tmp_path):
    filled(tmp_path / "a.db", {0: State.CANDIDATE})
    filled(tmp_path / "b.db", {1: State.CANDIDATE})
    assert set(merged(tmp_path / "alone.db", tmp_path / "a.bundle").values()) == {State.CANDIDATE}
    both = merged(tmp_path / "both.db", tmp_path / "a.bundle", tmp_path / "b.bundle")
    assert set(both.values()) == {State.VERIFIED}


def test_retired_in_one_is_retired_in_both(tmp_path):
    filled(tmp_path / "a.db", {0: State.RETIRED})
    filled(tmp_path / "b.db", {1: State.PROMOTED, 3: State.PROMOTED})
    both = merged(tmp_path / "both.db", tmp_path / "b.bundle", tmp_path / "a.bundle")
    assert both == {POOL[0].id: State.RETIRED, POOL[1].id: State.RETIRED, POOL[3].id: State.PROMOTED}


def test_retired_as_measured_in_one_is_retired_as_estimated_in_both(tmp_path):
    """Not the other way round; whichever comes first."""
    measured, estimate, later = POOL[0].id, POOL[MEASURED].id, POOL[MEASURED + 1].id
    filled(tmp_path / "a.db", {0: State.RETIRED})
    filled(tmp_path / "b.db", {MEASURED: State.CANDIDATE})
    for order in ("ab", "ba"):
        both = merged(tmp_path / f"{order}.db", *(tmp_path / f"{name}.bundle" for name in order))
        assert both == {measured: State.RETIRED, estimate: State.RETIRED}
    filled(tmp_path / "c.db", {MEASURED: State.RETIRED})
    filled(tmp_path / "d.db", {0: State.CANDIDATE, MEASURED + 1: State.CANDIDATE})
    both = merged(tmp_path / "cd.db", tmp_path / "c.bundle", tmp_path / "d.bundle")
    assert both == {measured: State.CANDIDATE, estimate: State.RETIRED, later: State.CANDIDATE}


@pytest.mark.parametrize("state", [State.CANDIDATE, State.VERIFIED, State.PROMOTED, State.RETIRED])
def test_estimates_are_never_preferred(tmp_path, state):
    """Whatever a bundle says of them."""
    write_bundle(tmp_path / "a.bundle", [(ESTIMATE, state)])
    if state in (State.VERIFIED, State.PROMOTED):
        with pytest.raises(DatabaseError, match=f"it is an estimate, which cannot be {state}"):
            merged(tmp_path / "a.db", tmp_path / "a.bundle")
    else:
        assert merged(tmp_path / "a.db", tmp_path / "a.bundle") == {ESTIMATE.id: state}


@pytest.mark.parametrize("suffix", [".bundle", ".gz"])
def test_between_homes(database, tmp_path, suffix):
    made = [*random_records(SEED, 299), ESTIMATE]
    commit(database, made)
    export_bundle(database, tmp_path / f"a{suffix}")
    with open_database(tmp_path / "copy.db") as copy:
        assert import_bundle(copy, tmp_path / f"a{suffix}") == (300, 300)
        assert import_bundle(copy, tmp_path / f"a{suffix}") == (300, 0)
        assert content(copy) == content(database)
        assert {item[0] for item in all_records(copy)} == set(made)


def test_torn_or_altered_is_refused(database, tmp_path):
    path, bad = tmp_path / "a.bundle", tmp_path / "bad.bundle"
    write_bundle(path, ((made, State.CANDIDATE) for made in random_records(SEED, 50)))
    whole = path.read_bytes()
    rng = random.Random(SEED)
    lines = whole.splitlines(keepends=True)
    damaged = [
        b"",
        whole[: rng.randrange(len(whole) - 1)],
        b"".join(lines[:-1]),
        b"".join(lines[:5] + lines[6:]),
        re.sub(rb'"host\d"', b'"host9"', whole, count=1),
        whole + b"{}\n",
        gzip.compress(whole),
    ]
    for content_of in damaged:
        bad.write_bytes(content_of)
        with pytest.raises(DatabaseError, match="nothing was imported"):
            import_bundle(database, bad)
    assert content(database) == {}
    import_bundle(database, path)  # the whole one is taken
    assert len(content(database)) == 50


def test_older_and_newer_formats(database, tmp_path, monkeypatch):
    """Format 1 knows no estimates; versions that know no other refuse what we write."""
    path, old = tmp_path / "a.bundle", tmp_path / "old.bundle"
    path.write_text('{"bundle": 3}\n')
    with pytest.raises(DatabaseError, match="bundle format 3, this version reads 2 at most; update vllm-compile"):
        import_bundle(database, path)
    monkeypatch.setattr("vllm_compile.schedules.database.bundle.FORMAT", 1)
    write_bundle(old, [(POOL[0], State.CANDIDATE)])
    monkeypatch.undo()
    assert import_bundle(database, old) == (1, 1)
    path.unlink()
    export_bundle(database, path)
    assert [file.read_text().splitlines()[0] for file in (old, path)] == ['{"bundle":1}', '{"bundle":2}']


def test_never_over_a_file(database, tmp_path):
    path = tmp_path / "a.bundle"
    path.write_text("mine")
    with pytest.raises(DatabaseError, match="exists already"):
        export_bundle(database, path)
    assert path.read_text() == "mine"
    with pytest.raises(DatabaseError, match="cannot be written"):
        export_bundle(database, tmp_path / "nowhere" / "a.bundle")
    assert [entry.name for entry in tmp_path.iterdir() if "bundle" in entry.name] == ["a.bundle"]
