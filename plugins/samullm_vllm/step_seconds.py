"""Seconds of one iteration at a time, for engines that only take the time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any


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
        self._of = dict(latency)
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
        of = self._of
        prefill_tokens = sum(new for _, new in prefills)
        pairs = sum(new * before + new * (new + 1) / 2 for before, new in prefills)
        seqs = len(prefills) + len(contexts)
        many = len(contexts) > of["longest_over_seqs"]
        longest_s = of["longest_token_s"] * max(contexts, default=0) if many else 0.0
        work = (
            self._by_tokens(prefill_tokens + len(contexts))
            + self._by_seqs(seqs)
            + of["prefill_token_s"] * prefill_tokens
            + of["prefill_seq_s"] * len(prefills)
            + of["prefill_pair_s"] * pairs
            + (of["prefill_step_s"] if prefills else 0.0)
            + max(of["context_token_s"] * sum(contexts), longest_s)
        )
        device = max(work, of["prefill_launch_s"] if prefills else of["launch_s"])
        host = self._host(seqs)
        return float(max(device, host) if of["overlap_host"] else device + host)
