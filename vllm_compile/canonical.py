"""Canonical JSON: one text for one value, so that equal values have equal digests on every machine."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical(value: Any) -> str:
    """The one JSON text of `value`: keys sorted, no spaces, ASCII; ValueError for what is no number (nan, inf)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def object_of(text: str) -> dict[str, Any]:
    """The JSON object in a text; ValueError if it holds anything else."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object: {text[:40]}")
    return value


def sha256(text: str) -> str:
    """Hex digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
