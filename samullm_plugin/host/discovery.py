"""Entry points of every installed distribution, whatever state their metadata are in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

GROUP = "samullm"
"""The group of entry points that plugins are in."""


@dataclass(frozen=True, slots=True)
class BrokenMetadata:
    """A distribution whose metadata cannot be read.

    Attributes:
        name: of the distribution, or of the folder of its metadata.
        reason: what is wrong.
    """

    name: str
    reason: str


def installed_plugins() -> Iterator[metadata.EntryPoint | BrokenMetadata]:
    """Yield the plugins of every distribution, the first of each name on the path.

    The metadata of an interrupted removal, or of a package that somebody else built wrongly, cost
    that distribution's plugins and no others.
    """
    seen: set[str] = set()
    named: set[str] = set()
    for distribution in metadata.distributions():
        folder = Path(str(getattr(distribution, "_path", "unknown")))
        # As the folder of its metadata has it: reading all metadata would take most of a command.
        first = _one_spelling(folder.stem.partition("-")[0])
        if first in seen and folder.name != "unknown":
            continue
        seen.add(first)
        if not _mentions(distribution):
            continue
        name = folder.name
        try:
            found = distribution.metadata["Name"]
            if found:
                name = str(found)
                if _one_spelling(name) in named:
                    continue
                named.add(_one_spelling(name))
            points = list(distribution.entry_points.select(group=GROUP))
            if points and not found:
                raise ValueError("there is no METADATA: what an interrupted removal left?")
        except Exception as error:  # anything can be in those files
            reason = f"its metadata cannot be read ({error}); remove {folder}, or install again"
            yield BrokenMetadata(name, reason)
            continue
        yield from points


def _one_spelling(name: str) -> str:
    """Return a distribution's name as it is compared with others."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _mentions(distribution: metadata.Distribution) -> bool:
    """Return whether a distribution has plugins, as far as its files can be read at all."""
    try:
        return f"[{GROUP}]" in (distribution.read_text("entry_points.txt") or "")
    except (OSError, ValueError):
        return True
