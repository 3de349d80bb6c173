"""Pages in a real browser: headless Chromium, of Debian's package `chromium`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # which is too small in some containers
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the browser itself stays offline
    "--enable-logging=stderr",
    "--window-size=1280,1600",
)
LIMIT = 600  # seconds; it takes a few on a machine that does nothing else


@dataclass(frozen=True)
class Element:
    """An element of the page as the browser holds it."""

    tag: str
    attributes: dict[str, str | None]


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: list[Element] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append(Element(tag, dict(attrs)))


@dataclass(frozen=True)
class Page:
    """What a browser made of a page: its elements, its text, what its console said, which addresses it asked for."""

    elements: list[Element]
    html: str
    console: list[str]
    requests: list[str]

    def count(self, tag: str, class_: str | None = None) -> int:
        """Elements of this tag, and of this class if given."""
        found = [e for e in self.elements if e.tag == tag]
        return sum(class_ is None or class_ in (e.attributes.get("class") or "").split() for e in found)


def find_browser() -> str:
    """Its path; the test is skipped where there is none, and fails where REQUIRE_BROWSER is set."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        assert "REQUIRE_BROWSER" not in os.environ, "install Debian's package chromium"
        pytest.skip("no Chromium on the PATH (Debian's package chromium)")
    return path


def open_page(file: Path, profile: Path, *switches: str) -> Page:
    """Open a file; `profile` is a new directory."""
    log = profile / "net.json"
    profile.mkdir()
    command = [find_browser(), *SWITCHES, *switches, f"--user-data-dir={profile}", f"--log-net-log={log}", "--dump-dom"]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=LIMIT)
    parser = _Elements()
    parser.feed(done.stdout)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Page(parser.elements, done.stdout, console, _requests(log))


def screenshot(file: Path, profile: Path, image: Path, *switches: str) -> None:
    """Write what the page looks like to a PNG."""
    command = [find_browser(), *SWITCHES, *switches, f"--user-data-dir={profile}", f"--screenshot={image}"]
    subprocess.run([*command, file.as_uri()], capture_output=True, timeout=LIMIT, check=True)


def _requests(log: Path) -> list[str]:
    """Addresses that the page asked for, in Chromium's own log; what the browser asks for itself has no origin."""
    events = json.loads(log.read_text())["events"]
    asked = (event["params"] for event in events if "initiator" in event.get("params", {}))
    return sorted({p["url"] for p in asked if p["initiator"] != "not an origin" and not p["url"].startswith("file:")})
