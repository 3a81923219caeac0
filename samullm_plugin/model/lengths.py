"""Output lengths: those that were seen, and distributions made of them, sampled fast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from samullm_plugin.errors import InputError
from samullm_plugin.model.types import Bools, Floats, Ints


@dataclass(frozen=True, slots=True, eq=False)
class LengthObservations:
    """Output lengths that were seen, for one model and task.

    Attributes:
        model: name of the model.
        task: label, may be empty.
        prompt_tokens: shape ``(n,)``.
        output_tokens: lengths seen, shape ``(n,)``.
        censored: the output was cut by a limit or is still in flight: it is at least this long,
            shape ``(n,)``.
        prompts: prompt texts, one per observation; None: not kept.
    """

    model: str
    task: str
    prompt_tokens: Ints
    output_tokens: Ints
    censored: Bools
    prompts: tuple[str, ...] | None = None


_STEPS = 4000
"""By which a quantile function is laid out."""
UNBOUNDED = np.iinfo(np.int64).max
"""Stands for a length beyond everything that was seen; limits cut it."""


@dataclass(frozen=True, slots=True, eq=False)
class LengthDistribution:
    """A step distribution function over whole lengths.

    What is missing from the last step to one is the mass of outputs that were cut where the
    measurement ended: they are at least ``censored_at`` long and otherwise unknown.

    Attributes:
        lengths: increasing lengths, at least 1, shape ``(k,)``; empty if every output was cut.
        cdf: probability of an output of at most that length, shape ``(k,)``.
        censored_at: shortest length the cut outputs can have had; 0 without any.
    """

    lengths: Ints
    cdf: Floats
    censored_at: int = 0

    @classmethod
    def from_quantiles(
        cls,
        probabilities: Floats,
        lengths: Floats,
        *,
        censored_at: int = 0,
    ) -> LengthDistribution:
        """Return the distribution whose quantile function is linear between given points.

        Args:
            probabilities: increasing, from 0 to the uncensored mass, shape ``(k,)``.
            lengths: not decreasing, shape ``(k,)``.
            censored_at: length at which the mass above the last probability was cut.
        """
        top = float(probabilities[-1])
        middles = (np.arange(_STEPS) + 0.5) / _STEPS * top
        drawn = np.rint(np.interp(middles, probabilities, lengths)).astype(np.int64)
        values, counts = np.unique(np.maximum(drawn, 1), return_counts=True)
        cdf = np.cumsum(counts, dtype=np.float64) * (top / _STEPS)
        return cls(values, cdf, censored_at)

    @classmethod
    def kaplan_meier(
        cls, lengths: Ints, censored: Bools, weights: Floats | None = None
    ) -> LengthDistribution:
        """Return the product-limit estimate from right-censored lengths.

        A censored length counts as at risk up to and including its own value (Kaplan and Meier
        1958), so that an output cut at a limit is never mistaken for a short one.

        Args:
            lengths: lengths seen, shape ``(n,)``.
            censored: the true length is at least that, shape ``(n,)``.
            weights: how often each counts, shape ``(n,)``; None: once.

        Raises:
            InputError: without observations or for lengths below one.
        """
        if len(lengths) == 0:
            raise InputError("length observations: none were given")
        if (lengths < 1).any():
            row = int(np.argmax(lengths < 1))
            raise InputError(f"length observations: row {row} is {lengths[row]}; the least is 1")
        weight = np.ones(len(lengths)) if weights is None else np.asarray(weights, np.float64)
        values, inverse = np.unique(lengths, return_inverse=True)
        total = np.bincount(inverse, weight, len(values))
        events = np.bincount(inverse, np.where(censored, 0.0, weight), len(values))
        at_risk = np.cumsum(total[::-1])[::-1]
        survival: Floats = np.cumprod(1.0 - events / at_risk, dtype=np.float64)
        seen = events > 0
        cut = int(values[-1]) if not seen[-1] or events[-1] < total[-1] else 0
        return cls(values[seen], (1.0 - survival)[seen], cut)

    @property
    def cut_mass(self) -> float:
        """Return the share of outputs that were cut where the measurement ended."""
        return max(0.0, 1.0 - float(self.cdf[-1])) if len(self.cdf) else 1.0

    def cdf_at(self, lengths: Ints | Floats) -> Floats:
        """Return the probability of an output of at most each length, shape of ``lengths``."""
        index = np.searchsorted(self.lengths, lengths, side="right")
        return np.concatenate(([0.0], self.cdf))[index]

    def quantile(self, probabilities: Floats) -> Ints:
        """Return the inverse distribution function; ``UNBOUNDED`` in the mass that was cut."""
        if not len(self.lengths):
            return np.full(np.shape(probabilities), UNBOUNDED)
        index = np.searchsorted(self.cdf - 1e-12, probabilities, side="left")
        values = self.lengths[np.minimum(index, len(self.lengths) - 1)]
        whole = self.cut_mass < 1e-9  # rounding must not open a gap at the top
        return np.where((index >= len(self.lengths)) & (not whole), UNBOUNDED, values)

    def conditional_quantile(self, uniforms: Floats, generated: Ints) -> Ints:
        """Return lengths above ``generated`` by inverse transform.

        Args:
            uniforms: in [0, 1), shape ``(..., n)``.
            generated: tokens generated so far, shape ``(n,)``; 0: unconditional.

        Returns:
            Shape of ``uniforms``; ``UNBOUNDED`` beyond the support.
        """
        below = np.where(np.asarray(generated) > 0, self.cdf_at(generated), 0.0)
        drawn = self.quantile(below + np.asarray(uniforms) * (1.0 - below))
        return np.where((drawn <= generated) | (below >= 1.0 - 1e-12), UNBOUNDED, drawn)

    def mean(self, limit: int) -> float:
        """Return the mean of outputs cut at ``limit``."""
        mass = np.diff(self.cdf, prepend=0.0)
        return float(np.minimum(self.lengths, limit) @ mass + self.cut_mass * limit)

    def scaled(self, factor: float) -> LengthDistribution:
        """Return the distribution of lengths ``factor`` times as long."""
        if not np.isfinite(factor) or factor <= 0:
            raise InputError(f"length factor {factor} must be positive")
        scaled = np.maximum(np.rint(self.lengths * factor), 1).astype(np.int64)
        values, first = np.unique(scaled[::-1], return_index=True)
        last = len(scaled) - 1 - first
        return LengthDistribution(values, self.cdf[last], round(self.censored_at * factor))

    def weighted_points(self, total: float) -> tuple[Ints, Bools, Floats]:
        """Return the distribution as (lengths, censored, weights) of summed weight ``total``."""
        mass = np.diff(self.cdf, prepend=0.0) * total
        if self.cut_mass < 1e-9:
            return self.lengths, np.zeros(len(mass), bool), mass
        cut = max(self.censored_at, int(self.lengths[-1]) if len(self.lengths) else 1)
        return (
            np.append(self.lengths, cut),
            np.append(np.zeros(len(mass), bool), True),
            np.append(mass, self.cut_mass * total),
        )
