"""Leaves out paragraphs whose vector another one nearly has."""

from __future__ import annotations

import math
from typing import Any


def distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that are like none before; like means a cosine above 0.9999."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        if all(cosine(row["embedding"], other["embedding"]) <= 0.9999 for other in kept):
            kept.append(row)
    return kept


def cosine(one: list[float], other: list[float]) -> float:
    """Return the cosine of the angle between two vectors."""
    length = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / length
