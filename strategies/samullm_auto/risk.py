"""One figure for the makespans of several length scenarios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from samullm_plugin.model.types import Floats

RiskMeasure = Literal["mean", "quantile", "cvar"]


@dataclass(frozen=True, slots=True)
class Risk:
    """What of the distribution of makespans is to be small.

    Attributes:
        measure: the mean, the ``level`` quantile, or the mean of the worst ``1 - level`` of the
            scenarios (conditional value at risk).
        level: in (0, 1).
    """

    measure: RiskMeasure = "mean"
    level: float = 0.9

    def of(self, makespan_s: Floats) -> float:
        """Return the figure; it never falls when a makespan rises.

        Args:
            makespan_s: one per scenario, shape ``(scenarios,)``.
        """
        if self.measure == "mean":
            return float(np.mean(makespan_s))
        if self.measure == "quantile":
            return float(np.quantile(makespan_s, self.level, method="higher"))
        worst = np.sort(makespan_s)[::-1]
        share = (1.0 - self.level) * len(worst)
        weights = np.clip(share - np.arange(len(worst)), 0.0, 1.0)
        return float(weights @ worst / share)
