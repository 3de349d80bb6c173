"""`vllm-compile db` and `worker`: what they print, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_compile import cli_worker
from vllm_compile.cli import main
from vllm_compile.schedules.database import How, commit, open_database, tasks

from .samples import linear, random_records, record

ROOT = Path(__file__).parents[3]


@pytest.fixture
def filled(url):
    """The URL of a database with three records, and their ids."""
    with open_database(url) as database:
        return url, commit(database, [record(), record(host="beta"), record(linear(N=64), us=3)])


@pytest.fixture
def db(url, capsys):
    """`db(*arguments)` gives the answer of a command that succeeds, and what it says to people."""

    def call(*arguments):
        capsys.readouterr()
        assert main(["db", "--db", url, *map(str, arguments), "--json"]) == 0
        said = capsys.readouterr()
        return json.loads(said.out.splitlines()[-1]), said.err

    return call


@pytest.fixture
def refused(url, capsys):
    """`refused(words, *arguments)`: exit code 2, and one line that holds `words`."""

    def check(words, *arguments):
        capsys.readouterr()
        assert main(["db", "--db", url, *map(str, arguments)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.strip().splitlines()
        assert line.startswith("error: ")
        assert words in line

    return check


def test_list_show_stats(filled, db):
    _, ids = filled
    answer, said = db("list")
    assert {item["id"] for item in answer} == set(ids)
    assert "3 of 3 records" in said
    assert [item["id"] for item in db("list", "--state", "candidate")[0]] == [ids[2]]
    assert db("list", "--op", "gate_up_silu")[0] == []
    assert len(db("list", "--limit", 1)[0]) == 1
    with open_database(filled[0]) as database:
        (estimate,) = commit(database, [record(us=1, how=How.ESTIMATED, verdict=None)])
    listed = [(item["workload"], item["how"], item["times"]["median"]) for item in db("list")[0]]
    of_one = [(how, median) for workload, how, median in listed if workload == db("show", estimate)[0]["workload"]]
    assert of_one == [("measured", 10), ("measured", 10), ("estimated", 1)]
    assert db("show", ids[2][:8])[0]["times"]["median"] == 3
    assert db("stats")[0]["records"] == {"candidate": 1, "verified": 2, "promoted": 0, "retired": 0}


def test_promote_retire(filled, db, refused):
    _, ids = filled
    refused("is candidate, only what is verified can be promoted", "promote", ids[2])
    assert db("promote", ids[0])[0]["state"] == "promoted"
    assert {item["state"] for item in db("list")[0]} == {"promoted", "candidate"}
    assert db("retire", ids[1])[0]["state"] == "retired"
    refused("is retired, only", "retire", ids[0])
    refused("no record starts with 'zzz'", "show", "zzz")


def test_export_import(filled, db, refused, tmp_path, capsys):
    bundle = tmp_path / "a.gz"
    assert db("export", bundle)[0] == {"records": 3, "damaged": 0}
    refused("exists already", "export", bundle)
    assert main(["db", "--db", str(tmp_path / "copy.db"), "import", str(bundle)]) == 0
    assert "3 records" in capsys.readouterr().err
    assert db("import", bundle)[0] == {"records": 3, "new": 0}
    refused("no such file", "import", tmp_path / "nothing")


def test_tokens(filled, db, refused, monkeypatch):
    answer, said = db("token", "create", "kernels")
    assert answer["token"] not in said
    refused("needs a token to write; set VLLM_COMPILE_DB_TOKEN", "retire", filled[1][0])
    monkeypatch.setenv("VLLM_COMPILE_DB_TOKEN", "a guess")
    refused("does not know this token", "retire", filled[1][0])
    monkeypatch.setenv("VLLM_COMPILE_DB_TOKEN", answer["token"])
    db("retire", filled[1][0])
    refused("is the last one in force", "token", "revoke", 1)
    refused("by its number", "token", "revoke", "kernels")
    assert [token["team"] for token in db("token", "list")[0]] == ["kernels"]


def test_migrate_and_roles(filled, db, refused):
    assert db("migrate")[0] == {"schema": "0004"}
    if filled[0].startswith("postgresql"):
        assert db("roles")[0] == {"roles": ["vllm_compile_reader", "vllm_compile_writer"]}
    else:
        refused("SQLite has no roles", "roles")


def test_explain_wants_an_artifact(filled, refused, tmp_path):
    refused("no compiled artifact here", "explain", tmp_path)


def test_no_database(tmp_path, capsys):
    assert main(["db", "--db", str(tmp_path / "none.db"), "list"]) == 2
    assert "no tuning database here" in capsys.readouterr().err


def test_the_script_needs_no_tvm(tmp_path):
    """Sharing records works where nothing is compiled."""
    with open_database(tmp_path / "a.db") as database:
        commit(database, random_records(1, 3))
    code = "import sys; sys.modules['tvm'] = None; from vllm_compile.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "db", "--db", tmp_path / "a.db", "--json", "stats"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["records"]["candidate"] == 3


def test_a_worker_does_installed_kinds_of_tasks(url, tmp_path):
    (tmp_path / "kinds.py").write_text(
        "from vllm_compile.schedules.database.executors import Outcome\ndef double(n): return Outcome(2 * n)\n"
    )
    info = tmp_path / "kinds-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kinds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm_compile.task_kinds]\ndouble = kinds:double\n")
    with open_database(url) as database:
        tasks.submit(database, "double", [1, 2, 3])
        command = [sys.executable, "-m", "vllm_compile.cli", "worker", "--db", url, "--until-empty", "--json"]
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == {"completed": 3, "failed": 0, "lost": 0}
        assert [task.result for task in tasks.all_tasks(database)] == [2, 4, 6]


def test_a_worker_without_kinds_says_so(url, capsys, monkeypatch):
    monkeypatch.setattr(cli_worker, "entry_points", lambda group: ())
    assert main(["worker", "--db", url]) == 2
    assert "no kind of task is installed here" in capsys.readouterr().err
