"""Cutting pages, checking facts and putting them together."""

from __future__ import annotations

import textwrap

from samullm_plugin import Reject


def cut(row: dict, size: int) -> list[dict]:
    """Return the pieces of a page."""
    return [{"text": piece} for piece in textwrap.wrap(row["page"], size)[:4]]


def known_year(row: dict) -> dict:
    """Return the facts with their century; facts of the future are rejected."""
    if row["year"] > 2030:
        raise Reject(f"the year {row['year']} is to come")
    return {**row["extract"], "century": row["year"] // 100 + 1}


def merge(row: dict) -> dict:
    """Return the people of all pieces of a page."""
    people = {name for facts in row["facts"] for name in facts["people"]}
    return {"people": sorted(people), "pieces": len(row["facts"])}
