"""What a lookup gives, in both homes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vllm_compile.schedules.database import How, Match, State, Workload, commit, home, lookup, open_database, workload
from vllm_compile.schedules.database.store import promote, retire

from .samples import CPU, H200, linear, record

H100 = replace(H200, device="NVIDIA H100", memory_mhz=2619)


def best(database, target=H200, **options):
    answer = lookup(database, linear(), target, **options)
    return None if answer is None else (answer.record.times.median, answer.match, answer.changed)


def test_round_trip(database):
    made = record()
    commit(database, [made])
    answer = lookup(database, linear(), H200)
    assert answer.record == made
    assert (answer.state, answer.match, answer.stale) == (State.CANDIDATE, Match.EXACT, False)


@pytest.mark.parametrize("other", [linear(N=8192), linear(K=8192), linear(tokens=(9, 16))])
def test_no_answer_for_another_workload(database, other):
    commit(database, [record()])
    assert lookup(database, other, H200) is None
    assert lookup(database, linear(), H200) is not None


def test_exact_before_architecture_though_slower(database):
    commit(database, [record(us=20, host="a"), record(us=10, target=H100, host="b")])
    assert best(database) == (20, Match.EXACT, ())


def test_architecture_where_nothing_is_exact(database):
    commit(database, [record(us=10, target=H100), record(us=1, target=replace(H200, arch="sm_100a"))])
    assert best(database) == (10, Match.ARCHITECTURE, ())


def test_never_another_architecture(database):
    commit(database, [record(target=CPU), record(target=replace(H200, arch="sm_100a"))])
    assert best(database) is None


@pytest.mark.parametrize("field", ["driver", "tvm"])
def test_stale_only_where_nothing_is_fresh(database, field):
    old = replace(H200, **{field: "older"})
    commit(database, [record(us=5, target=old)])
    assert best(database) == (5, Match.ARCHITECTURE, (field,))
    commit(database, [record(us=9, target=H100)])
    assert best(database) == (9, Match.ARCHITECTURE, ())


def test_unknown_driver_is_not_a_changed_one(database):
    commit(database, [record()])
    assert best(database, replace(H200, driver="", core_mhz=0)) == (10, Match.ARCHITECTURE, ())


def test_what_is_not_usable_hides_nothing(database):
    """By preference, whatever is next: another candidate, then another machine of the architecture."""
    verified = [record(us=30, config={"n": 3}, host=host) for host in "ab"]
    commit(database, [record(us=us, config={"n": us}) for us in (10, 11, 12)] + verified)
    commit(database, [record(us=5, config={"n": 5}, target=H100)])

    def without(*numbers):
        def usable(found):
            return found.schedule.content()["config"]["n"] not in numbers

        return best(database, usable=usable)

    assert without() == (30, Match.EXACT, ())
    assert without(3) == (10, Match.EXACT, ())
    assert without(3, 10, 12) == (11, Match.EXACT, ())
    assert without(3, 10, 11, 12) == (5, Match.ARCHITECTURE, ())
    assert without(3, 5, 10, 11, 12) is None


def test_others_may_write_while_it_is_asked_what_is_usable(database, url, monkeypatch):
    """That takes a while where TVM is asked; on SQLite a transaction would keep them out."""
    commit(database, [record(us=us, config={"n": us}) for us in (10, 11)])
    monkeypatch.setattr(home, "BUSY_SECONDS", 1)
    asked = []

    def usable(found):
        asked.append(found.times.median)
        with open_database(url) as other:
            commit(other, [record(linear(N=64), us=len(asked))])
        return False

    assert best(database, usable=usable) is None
    assert asked == [10, 11]


def test_estimates_only_if_asked_for(database):
    commit(database, [record(us=1, how=How.ESTIMATED, verdict=None)])
    assert best(database) is None
    assert best(database, hows=(How.MEASURED, How.ESTIMATED)) == (1, Match.EXACT, ())
    commit(database, [record(us=2)])
    assert best(database, hows=(How.MEASURED, How.ESTIMATED)) == (2, Match.EXACT, ())


def test_promoted_before_verified_before_candidates(database):
    good, better, fastest = ({"n": n} for n in range(3))
    ids = commit(database, [record(us=30 - n, config=c, host="a") for n, c in enumerate((good, better, fastest))])
    assert best(database)[0] == 28
    commit(database, [record(us=40 - n, config=c, host="b") for n, c in enumerate((good, better))])
    assert best(database)[0] == 29
    promote(database, ids[0])
    assert best(database)[0] == 30
    retire(database, ids[0])
    assert best(database)[0] == 29


def test_retired_whoever_measures_it_again(database):
    (first,) = commit(database, [record()])
    retire(database, first)
    commit(database, [record(us=3, host="beta")])
    assert best(database) is None


@pytest.mark.parametrize("when", ["before", "later"])
def test_retired_as_measured_is_not_estimated_again(database, when):
    hows = (How.MEASURED, How.ESTIMATED)
    other = record(us=9, config={"n": 1}, how=How.ESTIMATED, verdict=None)
    estimates = [record(us=1, how=How.ESTIMATED, verdict=None), other]
    if when == "before":
        commit(database, estimates)
    (measured,) = commit(database, [record(us=5)])
    assert best(database, hows=hows)[0] == 5
    retire(database, measured)
    if when == "later":
        commit(database, estimates)
    assert best(database, hows=hows)[0] == 9, "the other schedule's"


def test_a_retired_estimate_forbids_nothing(database):
    """The model of the machine may have changed since."""
    hows = (How.MEASURED, How.ESTIMATED)
    estimates = [record(us=us, how=How.ESTIMATED, verdict=None) for us in (1, 2, 3)]
    first, _ = commit(database, estimates[:2])
    retire(database, first)
    assert best(database, hows=hows) is None, "all that are there"
    commit(database, estimates[2:])
    assert best(database, hows=hows)[0] == 3
    commit(database, [record(us=5)])
    assert best(database, hows=hows)[0] == 5


def test_collision_of_digests(database, monkeypatch):
    """Workloads with one SHA-256 are told apart by their texts."""
    monkeypatch.setattr(workload, "sha256", lambda text: "0" * 64)
    commit(database, [record(linear(N=64), us=1), record(linear(N=128), us=2)])
    assert lookup(database, linear(N=64), H200).record.times.median == 1
    assert lookup(database, linear(N=128), H200).record.times.median == 2
    assert lookup(database, linear(N=192), H200) is None


def test_the_key_is_of_the_canonical_text():
    assert linear().key == Workload.from_text(linear().text).key
    assert linear().key != linear(N=64).key
