"""What this machine keeps between runs: answers that take long to find again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def cache_folder(name: str) -> Path:
    """Return the folder of one kind of answers.

    In the folder that the setting ``SAMULLM_CACHE_DIR`` names, by default the user's cache
    (``XDG_CACHE_HOME``).
    """
    if own := os.environ.get("SAMULLM_CACHE_DIR"):
        return Path(own) / name
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "samullm" / name


def read_kept(name: str, key: str) -> dict[str, Any] | None:
    """Return a kept answer; None if there is none that can be read."""
    try:
        value = json.loads((cache_folder(name) / f"{key}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def keep(name: str, key: str, value: object) -> bool:
    """Keep an answer, whole or not at all; return whether this machine has a place for it."""
    folder = cache_folder(name)
    new = folder / f".{key}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(value), encoding="utf-8")
        new.replace(folder / f"{key}.json")
    except OSError:
        return False
    return True
