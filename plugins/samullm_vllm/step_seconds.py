"""Seconds of one iteration at a time, for engines that only take the time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from samullm_plugin.model.latency import iteration_seconds


def curve(knots: list[float], values: list[float]) -> Callable[[float], float]:
    """Return the function that ``Curve`` of the host describes, for one number at a time."""
    slopes = [
        (v1 - v0) / (k1 - k0)
        for k0, k1, v0, v1 in zip(knots, knots[1:], values, values[1:], strict=False)
    ]

    def at(x: float) -> float:
        if x <= knots[0] or not slopes:
            return values[0]
        i = min(bisect_right(knots, x), len(slopes)) - 1
        return values[i] + slopes[i] * (x - knots[i])

    return at


class StepSeconds:
    """The iteration latency of a ``StepLatency``, one iteration at a time."""

    def __init__(self, latency: Mapping[str, Any]) -> None:
        """Take the fields of a ``StepLatency``, curves as pairs of lists."""
        self._latency = SimpleNamespace(**latency)
        self._by_tokens = curve(*latency["by_tokens"])
        self._by_seqs = curve(*latency["by_seqs"])
        self._host = curve(*latency["host_by_seqs"])

    def __call__(
        self,
        prefills: list[tuple[int, int]],
        contexts: list[int],
    ) -> float:
        """Return the seconds of an iteration.

        Args:
            prefills: computed and new tokens of each prefill sequence.
            contexts: length of each decode sequence with its current token.
        """
        prefill_tokens = sum(new for _, new in prefills)
        seqs = len(prefills) + len(contexts)
        seconds = iteration_seconds(
            self._latency,
            self._by_tokens(prefill_tokens + len(contexts)),
            self._by_seqs(seqs),
            self._host(seqs),
            len(contexts),
            len(prefills),
            prefill_tokens,
            sum(new * before + new * (new + 1) / 2 for before, new in prefills),
            sum(contexts),
            max(contexts, default=0),
        )
        return float(seconds)
