"""Telling of many bad rows in one message."""

from __future__ import annotations

import re
from collections.abc import Mapping

SHOWN = 20
"""So many different findings are listed in full; of the rest, only where they are."""

_PLACE = re.compile(r"(.*) (line|row) (\d+)(.*)", re.DOTALL)


def bad_rows_message(bad: Mapping[str, str], remedy: str = "") -> str:
    """Return one line that names every bad row.

    Args:
        bad: what is wrong, by where the row is.
        remedy: what comes of them; by default, what to do about them.
    """
    remedy = remedy or ("correct them, or write `on_bad_row: skip` in app.yaml to run the others")
    if len(bad) == 1:
        ((where, reason),) = bad.items()
        return f"{where}: {reason} ({remedy})"
    groups: dict[tuple[str, str], list[str]] = {}
    for where, reason in bad.items():
        found = _PLACE.fullmatch(where)
        file, place = (found[1], f"{found[2]} {found[3]}{found[4]}") if found else ("", where)
        groups.setdefault((file, reason), []).append(place)
    told = [
        f"{file + ' ' if file else ''}{_ranges(places)}: {reason}"
        for (file, reason), places in list(groups.items())[:SHOWN]
    ]
    rest = [
        f"{file + ' ' if file else ''}{place}"
        for (file, _), places in list(groups.items())[SHOWN:]
        for place in places
    ]
    if rest:
        told.append(f"also {_ranges(rest)}")
    return f"{len(bad)} bad rows: {'; '.join(told)} ({remedy})"


def _ranges(places: list[str]) -> str:
    """Return places as text, consecutive lines as ranges."""
    parts: list[str] = []
    last: tuple[str, int, int] | None = None
    for place in places:
        head, _, number = place.rpartition(" ")
        if not number.isdecimal():
            parts.append(place)
            last = None
        elif last is not None and last[0] == head and int(number) == last[2] + 1:
            last = (head, last[1], int(number))
            parts[-1] = f"{head}s {last[1]}-{last[2]}"
        else:
            last = (head, int(number), int(number))
            parts.append(place)
    return ", ".join(parts)
