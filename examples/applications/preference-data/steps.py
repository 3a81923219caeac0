"""From rated answers to pairs for training."""

from __future__ import annotations


def make_pair(row: dict) -> dict | None:
    """Return the best and the worst answer; nothing if all are rated alike."""
    ranked = sorted(row["answers"], key=lambda answer: answer["score"])
    if ranked[0]["score"] == ranked[-1]["score"]:
        return None
    return {
        "chosen": ranked[-1]["generate"],
        "rejected": ranked[0]["generate"],
        "margin": ranked[-1]["score"] - ranked[0]["score"],
    }
