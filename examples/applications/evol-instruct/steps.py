"""What happens to texts between the models."""

from __future__ import annotations

import re

from samullm_plugin import Reject


def split_list(row: dict) -> list[dict]:
    """Return the lines of a numbered list, one row each."""
    lines = re.findall(r"^\s*\d+[.)]\s*(.+)$", row["propose"], re.MULTILINE)
    if not lines:
        raise Reject("there is no numbered list in it")
    return [{"instruction": line.strip()} for line in lines[:5]]


def drop_duplicates(rows: list[dict]) -> list[dict]:
    """Return the first row of every instruction."""
    first: dict[str, dict] = {}
    for row in rows:
        first.setdefault(row["parse"]["instruction"].lower(), row)
    return list(first.values())
