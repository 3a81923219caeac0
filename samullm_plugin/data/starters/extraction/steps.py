"""Cutting pages, checking what was extracted, and putting it together."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from samullm_plugin import Reject


class Facts(BaseModel):
    """People and a year of one piece of a page."""

    people: Annotated[list[Annotated[str, Field(max_length=40)]], Field(max_length=4)]
    year: Annotated[int, Field(ge=0, le=2100)]


def cut(row: Mapping[str, Any], size: int) -> list[dict[str, str]]:
    """Return the pieces of a page."""
    return [{"text": piece} for piece in textwrap.wrap(row["text"], size)[:4]]


def plausible(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts; those of a year that the piece does not name are rejected."""
    if str(row["year"]) not in row["pieces"]["text"]:
        raise Reject(f"the piece does not name the year {row['year']}")
    return dict(row["facts"])


def merge(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all pieces of a page say together."""
    facts = row["facts"]
    return {
        "people": sorted({name for one in facts for name in one["people"]}),
        "years": sorted({one["year"] for one in facts}),
        "pieces": len(facts),
    }
