"""The process that verifies: the verdict when it ends before its time.  What it compares is tested in test_compile."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from vllm_compile import quick_verification, verify

TOLD = f"read line; echo {quick_verification.REFERENCES}"
OUTCOMES = {
    "killed before it is told": ("kill -9 $$", "not-run", "references were ended by signal 9"),
    "crashed when it was told early": ("read line; kill -11 $$", "not-run", "references were ended by signal 11"),
    "killed afterwards": (f"{TOLD}; kill -9 $$", "not-run", "is there memory for it"),
    "crashed afterwards": (f"{TOLD}; kill -11 $$", "fail", r"a kernel crashed \(signal 11\)"),
    "an error": (f"{TOLD}; echo the reason >&2; exit 3", "not-run", "^the reason$"),
}


@pytest.mark.parametrize(("script", "outcome", "reason"), OUTCOMES.values(), ids=OUTCOMES)
def test_what_ends_early(script, outcome, reason, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(quick_verification.sys, "executable", str(python))
    with quick_verification.quick_verification(Path("artifact"), Path("model"), "cpu", None) as verdict:
        found = verdict()
    assert found["outcome"] == outcome
    assert re.search(reason, found["reason"])


def test_references_that_print_are_known_to_have_run(monkeypatch, capfd):
    """Part of a line, say: the crash of a kernel after them is told from their own."""
    monkeypatch.setattr(verify, "run_references", lambda *_, **__: print("loading", end=""))
    monkeypatch.setattr(verify, "compare", lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
    monkeypatch.setattr(sys, "stdin", io.StringIO("the artifact is whole\n"))
    with pytest.raises(ZeroDivisionError):
        quick_verification.main(["artifact", "model", "cpu"])
    printed = capfd.readouterr().out
    assert quick_verification._verdict(-11, printed, "")["outcome"] == "fail"
    assert quick_verification._verdict(-11, "loading", "")["outcome"] == "not-run"
