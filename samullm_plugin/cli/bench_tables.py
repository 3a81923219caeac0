"""How the bench's tables show figures."""

from __future__ import annotations

LOSS = 0.995
"""Speedups below this are losses; what rounds to 1.00x is neither."""


def seconds(value: float | None) -> str:
    """Return seconds with three significant digits or so."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def percent(share: float | None) -> str:
    """Return a share in percent."""
    return "-" if share is None else f"{100 * share:.1f} %"


def speedup(value: float | None) -> str:
    """Return a speedup, a loss marked."""
    return "-" if value is None else f"{value:.2f}x{' !' if value < LOSS else ''}"


def least_speedup(values: list[float]) -> str:
    """Return the worst of some speedups."""
    return f"{min(values):.2f}x" if values else "-"


def median_speedup(values: list[float]) -> str:
    """Return the median of some speedups."""
    from statistics import median

    return f"{median(values):.2f}x" if values else "-"
