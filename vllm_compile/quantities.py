"""Numbers with units, as people read them."""

from __future__ import annotations


def scaled(value: float, units: tuple[str, ...], step: float) -> str:
    """Three digits of `value` and the largest of `units` (each `step` times the one before) that keeps it above 1."""
    unit = 0
    while abs(value) >= 999.5 * step / 1000 and unit < len(units) - 1:
        value, unit = value / step, unit + 1
    return f"{value:.3g} {units[unit]}".rstrip() if abs(value) < 999.5 else f"{value:,.0f} {units[unit]}".rstrip()


def count(value: float) -> str:
    """`8.03 G`"""
    return scaled(value, ("", "k", "M", "G", "T", "P", "E"), 1000)


def binary(value: float) -> str:
    """Bytes, in powers of 1,024: `15.0 GiB`."""
    return scaled(value, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), 1024)


def duration(seconds: float) -> str:
    """`4.26 ms`"""
    if abs(seconds) >= 1:
        return f"{seconds:,.3g} s" if abs(seconds) < 999.5 else f"{seconds:,.0f} s"
    return scaled(seconds * 1e9, ("ns", "µs", "ms"), 1000)
