"""Entry points of every installed distribution, whatever state their metadata are in."""

from __future__ import annotations

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
    for distribution in metadata.distributions():
        folder = str(getattr(distribution, "_path", "unknown"))
        name = folder
        try:
            found = distribution.metadata["Name"]
            if found:
                name = str(found)
            if name.lower() in seen:
                continue
            seen.add(name.lower())
            points = list(distribution.entry_points.select(group=GROUP))
            if points and not found:
                raise ValueError("there is no METADATA: what an interrupted removal left?")
        except Exception as error:  # anything can be in those files
            if _mentions(distribution):
                reason = f"its metadata cannot be read ({error}); remove {folder}, or install again"
                yield BrokenMetadata(Path(name).name, reason)
            continue
        yield from points


def _mentions(distribution: metadata.Distribution) -> bool:
    """Return whether a distribution has plugins, as far as its files can be read at all."""
    try:
        return f"[{GROUP}]" in (distribution.read_text("entry_points.txt") or "")
    except (OSError, ValueError):
        return True
